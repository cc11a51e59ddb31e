"""The Triton kernel: its cases under the interpreter and on a GPU, each in a process of its own; and for Hopper."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sana_lab.ops.linear_attention import linear_attention

CASES = Path(__file__).with_name("cases_linear_attention_triton.py")
NOT_INTERPRETED = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels here are interpreted")
triton = pytest.importorskip("triton")


def run_cases(select: str, **environment: str) -> None:
    """Run the cases that match a marker expression in a new process; its failures are this test's."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", select, str(CASES)]
    done = subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=False, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout, done.stdout


def test_interpreted() -> None:
    run_cases("not gpu and not slow", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")


@pytest.mark.slow
def test_interpreted_through_inductor() -> None:
    run_cases("slow and not gpu", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    run_cases("gpu or not gpu", CUBLAS_WORKSPACE_CONFIG=":4096:8")


@NOT_INTERPRETED
def test_explicit_triton_on_the_cpu_says_what_it_needs() -> None:
    q, k, v = torch.zeros(1, 2, 3, 1, 4).unbind(2)
    with pytest.raises(ValueError, match=r"needs CUDA tensors, or TRITON_INTERPRET=1 .* these tensors are on cpu"):
        linear_attention(q, k, v, backend="triton")


def signature(kernel: Any, dtype: torch.dtype, constants: dict[str, Any]) -> tuple[dict[str, Any], dict, dict]:
    """Types, constants and alignments that Triton infers from a launch on a fused projection of 16-byte rows."""
    sums = ("state", "partials", "dstate", "products", "means", "rstd", "norm", "norm_q", "norm_k", "dnorm")
    types = {**dict.fromkeys(sums, "*fp32"), "keep": "*i1", "N": "i32", "H": "i32", "eps": "fp32"}
    data = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}[dtype]
    signature: dict[str, Any] = {}
    fixed: dict[tuple[int, ...], Any] = {}
    aligned: list[tuple[int, ...]] = []
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], fixed[i,] = "constexpr", constants[name]
        elif name.endswith("strides"):
            signature[name], fixed[i, 3] = ("i32", "i32", "i32", "constexpr"), 1
            aligned += [(i, j) for j in range(3)]
        else:
            signature[name] = types.get(name, data)
            aligned += [(i,)] if signature[name].startswith("*") else []
    return signature, fixed, {place: [["tt.divisibility", 16]] for place in aligned}


KERNELS = ("state", "apply", "forward", "query", "key_products", "key_value", "backward")


@NOT_INTERPRETED
@pytest.mark.slow
@pytest.mark.parametrize("width", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kernels_compile_for_hopper(dtype: torch.dtype, width: int) -> None:
    """Needs no GPU: Triton brings its assembler. A Hopper processor has 227 KiB of shared memory for a program."""
    from triton.backends.compiler import GPUTarget

    from sana_lab.ops import linear_attention_kernels as kernels
    from sana_lab.ops import linear_attention_triton as module
    from sana_lab.ops.linear_attention_plan import plan

    cut = plan(torch.empty(2, 4096, 36, width, dtype=dtype, device="meta"))
    for name, normed in [(name, normed) for name in KERNELS for normed in (False, True)]:
        constants = {"D": width, "W": cut.width, "GROUP": cut.group, "T": cut.tile, "LOOPS": cut.loops}
        constants |= {"PRECISION": cut.precision, "MASKED": True, "NORMED": normed, "PARTS": 8}
        constants |= {"PRODUCT": module.product(dtype, normed)}
        kernel = getattr(kernels, f"{name}_kernel")
        source = triton.compiler.ASTSource(kernel, *signature(kernel, dtype, constants))
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": cut.warps})
        assert built.metadata.shared <= 227 * 1024
        assert "atom" not in built.asm["ptx"]
