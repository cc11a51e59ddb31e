"""For tests of Triton kernels: cases run in processes of their own, and kernels compiled without a GPU."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
INTERPRETED = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def run_cases(files: Sequence[str], select: str, **environment: str) -> None:
    """Run the cases that match a marker expression in a new process; its failures are this test's.

    Triton decides when it is imported whether it interprets, so one process cannot do both.
    """
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(HERE / name) for name in files]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", select, *paths]
    done = subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=False, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout, done.stdout


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
