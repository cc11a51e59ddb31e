"""For tests of Triton kernels: the runner of case files, and kernels compiled without a GPU.

Triton decides when it is imported whether it interprets, so a test process cannot do both. The tests of kernels are
files named cases_*.py, which pytest does not collect by itself; one process of their own runs them all, on the CPU
under Triton's interpreter, or on a GPU.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

HERE = Path(__file__).parent
INTERPRETED = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def run_cases(select: str, **environment: str) -> None:
    """Run the cases of all kernels that match a marker expression; their failures are this test's."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [*map(str, sorted(HERE.rglob("cases_*.py")))]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", select, *paths]
    result = subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=False, timeout=1500)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "skipped" not in result.stdout, result.stdout


def compiled(kernel: Any, dtype: torch.dtype, constants: dict[str, Any], warps: int, **types: str) -> Any:
    """The kernel built for Hopper by Triton's own assembler, for tensors of `dtype` with 16-byte rows.

    Arguments whose names end in `strides` are a tensor's; `types` says what else is no pointer to `dtype`.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    data = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}[dtype]
    signature: dict[str, Any] = {}
    fixed: dict[tuple[int, ...], Any] = {}
    aligned: list[tuple[int, ...]] = []
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], fixed[i,] = "constexpr", constants[name]
        elif name.endswith("strides"):
            axes = 2 if name.startswith(("gate", "shift", "scale")) else 4
            signature[name], fixed[i, axes - 1] = (*("i32",) * (axes - 1), "constexpr"), 1
            aligned += [(i, j) for j in range(axes - 1)]
        else:
            signature[name] = types.get(name, data)
            aligned += [(i,)] if signature[name].startswith("*") or name in ("M", "C") else []
    source = triton.compiler.ASTSource(
        kernel, signature, fixed, {place: [["tt.divisibility", 16]] for place in aligned}
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})


class MachineCode(NamedTuple):
    """What the assembler made of a kernel."""

    registers: int  # per thread
    stack: int  # bytes of spilled registers
    loop: int  # instructions of the longest loop


def machine_code(built: Any) -> MachineCode:
    """Registers, spills and instructions of a compiled kernel, by the tools that come with Triton."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    registers, stack = (int(re.findall(rf"{name}:(\d+)", usage)[0]) for name in ("REG", "STACK"))
    return MachineCode(registers, stack, _longest_loop(code))


def _longest_loop(code: str) -> int:
    """The most instructions from a label to a branch back to it."""
    labels: dict[str, int] = {}
    count = longest = 0
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line.strip()):
            labels[label[1]] = count
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            count += 1
            back = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction[1])
            if back and back[1] in labels:
                longest = max(longest, count - labels[back[1]])
    return longest
