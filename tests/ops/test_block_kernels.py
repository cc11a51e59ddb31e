"""The kernels of Mix-FFN and of what lies between layers: under the interpreter, on a GPU, and compiled for Hopper."""

import os
from typing import Any

import pytest
import torch
from kernel_cases import INTERPRETED, compiled, run_cases

CASES = ["ops/mix_ffn/cases_kernels.py", "ops/modulate/cases_kernels.py"]
NOT_INTERPRETED = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels here are interpreted")
triton = pytest.importorskip("triton")


def test_interpreted() -> None:
    run_cases(CASES, "not gpu and not slow", **INTERPRETED)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    run_cases(CASES, "gpu or not gpu", CUBLAS_WORKSPACE_CONFIG=":4096:8")


def test_plans_are_few_and_fill_a_gpu() -> None:
    """They follow from shapes alone; an H200 has 132 processors."""
    from sana_lab.ops.mix_ffn import kernels as mix_ffn_kernels
    from sana_lab.ops.modulate import kernels as modulate_kernels

    sizes = [(b, n, n, c) for b in (1, 2, 32) for n in (1, 2, 5, 16, 32, 64, 128) for c in (1152, 2240)]
    cuts, runs = set(), set()
    for b, h, w, c in sizes:
        x, hidden = torch.empty(b, h, w, c, device="meta"), torch.empty(b, h, w, 5 * c, device="meta")
        cut = mix_ffn_kernels.plan(hidden, 5 * c)
        cuts |= {cut, mix_ffn_kernels.plan(hidden, 5 * c // 2)}
        assert cut.grid(hidden, 5 * c)[0] >= 528 or cut.rows == 4
        runs |= {modulate_kernels.plan(x, 1, 8), modulate_kernels.plan(x, 4, 64)}
    assert len(cuts) <= 12
    assert len({cut.loops for cut in runs}) <= 7


@NOT_INTERPRETED
@pytest.mark.slow
@pytest.mark.parametrize("width", [32, 5, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_mix_ffn_compiles_for_hopper(dtype: torch.dtype, width: int) -> None:
    """Needs no GPU: Triton brings its assembler. Only bfloat16 may approximate; a line is loaded in whole words."""
    from sana_lab.ops.mix_ffn import kernels as module

    cut = module.plan(torch.empty(2, 32, width, 5760, device="meta"), 5760)
    constants: dict[str, Any] = {"ROWS": cut.rows, "COLUMNS": cut.columns, "GROUPS": cut.groups}
    constants |= {"CHANNELS": cut.channels, "FAST": dtype == torch.bfloat16}
    types = {"h": "i32", "w": "i32", "M": "i32", "C": "i32", "sums": "*fp32"}
    runs = [(module._gate_kernel, {"BACKWARD": False}), (module._gate_kernel, {"BACKWARD": True})]
    for kernel, more in [*runs, (module._input_kernel, {})]:
        ptx = compiled(kernel, dtype, constants | more, cut.warps, **types).asm["ptx"]
        assert "atom" not in ptx
        assert ("tanh.approx" in ptx) == (dtype == torch.bfloat16)
        assert ("ld.global.v2.b32" if dtype == torch.float32 else "ld.global.b32") in ptx


@NOT_INTERPRETED
@pytest.mark.slow
@pytest.mark.parametrize("width", [1152, 2240])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_modulate_compiles_for_hopper(dtype: torch.dtype, width: int) -> None:
    from sana_lab.ops.modulate import kernels as module

    cut = module.plan(torch.empty(2, 32, 32, width, device="meta"), 4, 64)
    constants = {"W": cut.width, "LOOPS": cut.loops}
    types = {"N": "i32", "w": "i32", "C": "i32", "eps": "fp32", "sums": "*fp32"}
    for residual, gated, normed in [(False, False, True), (True, True, False), (True, True, True), (True, False, True)]:
        flags = {"RESIDUAL": residual, "GATED": gated, "NORMED": normed}
        for kernel in (module._forward_kernel, module._backward_kernel):
            ptx = compiled(kernel, dtype, constants | flags, cut.warps, **types).asm["ptx"]
            assert "atom" not in ptx
            assert "ld.global.v4.b32" in ptx
