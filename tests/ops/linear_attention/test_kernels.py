"""The Triton kernel: its cases under the interpreter and on a GPU, each in a process of its own; and for Hopper."""

import os

import pytest
import torch
from kernel_cases import INTERPRETED, compiled, run_cases

from sana_lab.ops.linear_attention.reference import linear_attention, qkv_linear_attention

CASES = ["ops/linear_attention/cases_kernels.py"]
NOT_INTERPRETED = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels here are interpreted")
pytest.importorskip("triton")


def test_interpreted() -> None:
    run_cases(CASES, "not gpu and not slow", **INTERPRETED)


@pytest.mark.slow
def test_interpreted_through_inductor() -> None:
    run_cases(CASES, "slow and not gpu", **INTERPRETED)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    run_cases(CASES, "gpu or not gpu", CUBLAS_WORKSPACE_CONFIG=":4096:8")


@NOT_INTERPRETED
def test_explicit_triton_on_the_cpu_says_what_it_needs() -> None:
    """Though the operators would run there by their closed form."""
    x = torch.zeros(1, 2, 3, 1, 4)
    for run in (
        lambda: linear_attention(*x.unbind(2), backend="triton"),
        lambda: qkv_linear_attention(x, backend="triton"),
    ):
        with pytest.raises(ValueError, match=r"needs CUDA tensors, or TRITON_INTERPRET=1 .* these tensors are on cpu"):
            run()


SUMS = ("state", "partials", "dstate", "products", "means", "rstd", "norm", "norm_q", "norm_k", "dnorm")
TYPES = {**dict.fromkeys(SUMS, "*fp32"), "keep": "*i1", "N": "i32", "H": "i32", "eps": "fp32"}
KERNELS = ("state", "apply", "forward", "query", "key_products", "key_value", "backward")


@NOT_INTERPRETED
@pytest.mark.slow
@pytest.mark.parametrize("width", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kernels_compile_for_hopper(dtype: torch.dtype, width: int) -> None:
    """Needs no GPU: Triton brings its assembler. A Hopper processor has 227 KiB of shared memory for a program."""
    from sana_lab.ops.linear_attention import kernels
    from sana_lab.ops.linear_attention import launch as module
    from sana_lab.ops.linear_attention.tiling import plan

    cut = plan(torch.empty(2, 4096, 36, width, dtype=dtype, device="meta"))
    for name, normed in [(name, normed) for name in KERNELS for normed in (False, True)]:
        constants = {"D": width, "W": cut.width, "GROUP": cut.group, "T": cut.tile, "LOOPS": cut.loops}
        constants |= {"PRECISION": cut.precision, "MASKED": True, "NORMED": normed, "PARTS": 8}
        constants |= {"PRODUCT": module.product(dtype, normed)}
        built = compiled(getattr(kernels, f"{name}_kernel"), dtype, constants, cut.warps, **TYPES)
        assert built.metadata.shared <= 227 * 1024
        assert "atom" not in built.asm["ptx"]
