"""The Triton kernels: their cases under the interpreter and on a GPU, and kernels compiled for Hopper without one."""

import os
from typing import Any

import pytest
import torch
from kernel_cases import INTERPRETED, compiled, machine_code, run_cases

from sana_lab.ops.linear_attention import linear_attention, qkv_linear_attention

NOT_INTERPRETED = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels here are interpreted")
triton = pytest.importorskip("triton")


def test_interpreted() -> None:
    run_cases("not gpu and not slow", **INTERPRETED)


@pytest.mark.slow
def test_interpreted_through_inductor() -> None:
    run_cases("slow and not gpu", **INTERPRETED)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    run_cases("gpu or not gpu", CUBLAS_WORKSPACE_CONFIG=":4096:8")


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
    steps = {"STEP": 5760, "OUT_STEP": 2880}
    runs = [(module._gate_kernel, {**steps, "BACKWARD": backward}) for backward in (False, True)]
    for kernel, more in [*runs, (module._input_kernel, {})]:
        ptx = compiled(kernel, dtype, constants | more, cut.warps, **types).asm["ptx"]
        assert "atom" not in ptx
        assert ("tanh.approx" in ptx) == (dtype == torch.bfloat16)
        assert ("ld.global.v2.b32" if dtype == torch.float32 else "ld.global.b32") in ptx


@NOT_INTERPRETED
@pytest.mark.slow
def test_mix_ffn_issues_few_instructions_for_hopper() -> None:
    """It is bound by their number: 368 a row of eight results a thread, four programs a multiprocessor (2^16 / 512
    registers a thread), no spills."""
    from sana_lab.ops.mix_ffn import kernels as module

    cut = module.plan(torch.empty(2, 32, 32, 5760, device="meta"), 2880)
    constants: dict[str, Any] = {"ROWS": cut.rows, "COLUMNS": cut.columns, "GROUPS": cut.groups, "FAST": True}
    constants |= {"CHANNELS": cut.channels, "STEP": 5760, "OUT_STEP": 2880, "BACKWARD": False}
    types = {"h": "i32", "w": "i32", "M": "i32"}
    machine = machine_code(compiled(module._gate_kernel, torch.bfloat16, constants, cut.warps, **types))
    assert machine.loop <= 380
    assert machine.registers <= 128
    assert machine.stack == 0


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


SUMS = ("state", "partials", "dstate", "products", "means", "rstd", "norm", "norm_q", "norm_k", "dnorm")
TYPES = {**dict.fromkeys(SUMS, "*fp32"), "keep": "*i1", "N": "i32", "H": "i32", "eps": "fp32"}
KERNELS = ("state", "apply", "forward", "query", "key_products", "key_value", "backward")


@NOT_INTERPRETED
@pytest.mark.slow
@pytest.mark.parametrize("width", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_linear_attention_compiles_for_hopper(dtype: torch.dtype, width: int) -> None:
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


@NOT_INTERPRETED
@pytest.mark.slow
@pytest.mark.parametrize(("name", "form"), [("query", "runs"), ("key_value", "runs"), ("backward", "one launch")])
def test_half_tiles_of_the_backward_take_fewer_registers_for_hopper(name: str, form: str) -> None:
    """So that a multiprocessor holds more programs; neither spills. Which is faster, `benchmarks/gpu.py` says."""
    from sana_lab.ops.linear_attention import kernels
    from sana_lab.ops.linear_attention.tiling import forms

    cuts = forms(torch.empty(2, 1024, 36, 32, dtype=torch.bfloat16, device="meta"))

    def built(cut: Any) -> Any:
        constants = {"D": 32, "W": cut.width, "GROUP": cut.group, "T": cut.tile, "LOOPS": cut.loops, "PARTS": 8}
        constants |= {"PRECISION": cut.precision, "MASKED": False, "NORMED": False}
        return machine_code(compiled(getattr(kernels, f"{name}_kernel"), torch.bfloat16, constants, cut.warps, **TYPES))

    whole, half = built(cuts[form]), built(cuts[f"{form}, half tiles"])
    assert half.registers < whole.registers
    assert (whole.stack, half.stack) == (0, 0)


@NOT_INTERPRETED
@pytest.mark.slow
@pytest.mark.parametrize("channels", [128, 512, 1024])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rms_norm_compiles_for_hopper(dtype: torch.dtype, channels: int) -> None:
    """No register is spilled."""
    from sana_lab.ops.rms_norm import kernels as module

    cut = module.plan(channels)
    constants = {"W": cut.width, "ROWS": cut.rows, "ADDED": True}
    built = compiled(module._kernel, dtype, constants, cut.warps, P="i32", C="i32", eps="fp32")
    assert built.metadata.shared <= 227 * 1024
    assert "st.local" not in built.asm["ptx"]
