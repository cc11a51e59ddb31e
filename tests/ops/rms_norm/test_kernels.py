"""The Triton kernel of RMSNorm: its cases under the interpreter and on a GPU, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CASES = Path(__file__).with_name("cases_kernels.py")
triton = pytest.importorskip("triton")


def run_cases(select: str, **environment: str) -> None:
    """Run the cases that match a marker expression in a new process; its failures are this test's."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", select, str(CASES)]
    done = subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def test_interpreted() -> None:
    run_cases("not gpu", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    run_cases("gpu or not gpu", CUBLAS_WORKSPACE_CONFIG=":4096:8")


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels here are interpreted")
@pytest.mark.parametrize("channels", [128, 512, 1024])
@pytest.mark.parametrize("pointer", ["*bf16", "*fp16", "*fp32"])
def test_compiles_for_hopper(channels: int, pointer: str) -> None:
    """Needs no GPU: Triton brings its assembler. No register is spilled."""
    from triton.backends.compiler import GPUTarget

    from sana_lab.ops.rms_norm import kernels as module

    cut = module.plan(channels)
    constants = {"W": cut.width, "ROWS": cut.rows, "ADDED": True}
    kernel = module._kernel
    types = {"P": "i32", "C": "i32", "eps": "fp32"}
    signature = {n: "constexpr" if n in constants else types.get(n, pointer) for n in kernel.arg_names}
    fixed = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=fixed)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": cut.warps})
    assert compiled.metadata.shared <= 227 * 1024
    assert "st.local" not in compiled.asm["ptx"]
