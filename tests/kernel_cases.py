"""For tests of Triton kernels: the runner of case files, and kernels compiled without a GPU.

Triton decides when it is imported whether it interprets, so a test process cannot do both. The tests of kernels are
files named cases_*.py, which pytest does not collect by itself; one process of their own runs them all, on the CPU
under Triton's interpreter, or on a GPU.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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
