"""Denoisers of 8-bit floats and of 4 bits: against the definitions, and what smoothing and the correction gain."""

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from sana_lab.bench.untrained import build_untrained
from sana_lab.config import experiments, hashing, schema
from sana_lab.config.specs import SpecError
from sana_lab.diffusion.sampling import Sampling
from sana_lab.models.dit import Dit
from sana_lab.ops.low_bits import int4, nvfp4
from sana_lab.systems import quantize as module
from sana_lab.systems.low_bit_layers import Fp8Linear, LowRankLinear, largest_inputs, smoothing
from sana_lab.systems.quantize import layers, quantize, quantized

DIT = {**tiny.DIT, "dim": 64, "depth": 2}
LARGE = ("attention.qkv", "attention.proj", "ffn.expand", "ffn.project")


def inputs() -> tuple[Any, ...]:
    return tiny.latents(dtype=torch.float32), torch.tensor([0.2, 0.9]), tiny.caption([3, 5], dtype=torch.float32)


def linear(outlier: float = 1.0) -> tuple[nn.Linear, Tensor]:
    """A layer of 64 to 96 with decaying singular values, and tokens of which one channel is larger."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 96)
    up, values, down = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    layer.weight.data = up * (values * torch.logspace(0, -2, 64)) @ down
    x = torch.randn(200, 64)
    x[:, 5] *= outlier
    return layer, x


@torch.no_grad()
def error(layer: nn.Module, exact: nn.Linear, x: Tensor) -> float:
    return tiny.error(layer(x), exact(x))


@torch.no_grad()
def test_fp8_in_one_kernel_is_the_simulation():
    """To bfloat16's rounding; a token in its own dtype."""
    layer, x = linear()
    kernel, definition = Fp8Linear(layer, simulated=False), Fp8Linear(layer, simulated=True)
    assert tiny.error(kernel(x), definition(x)) <= 2**-8
    assert 1e-3 < error(definition, layer, x) < 5e-2
    half = definition(x.bfloat16().view(2, 10, 10, 64))
    assert (half.dtype, half.shape) == (torch.bfloat16, (2, 10, 10, 96))
    assert tiny.error(half.float().flatten(0, 2), definition(x.bfloat16().float())) <= 2**-8


@pytest.mark.parametrize("rounding", [int4, nvfp4])
@torch.no_grad()
def test_smoothing_and_rank_lower_the_error(rounding: Any):
    layer, x = linear(outlier=30.0)
    smooth = smoothing(x.abs().amax(0), layer.weight.detach())
    plain = error(LowRankLinear(layer, rounding, 0, torch.ones(64)), layer, x)
    errors = [error(LowRankLinear(layer, rounding, rank, smooth), layer, x) for rank in (0, 8, 32, 64)]
    assert plain > errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 1e-5, "of full rank nothing is left to round"


def test_largest_inputs_are_those_of_all_calls():
    layer, x = linear()
    largest = largest_inputs({"a": layer}, lambda: [layer(x[:100]), layer(-x[100:].view(10, 10, 64))])
    assert torch.equal(largest["a"], x.abs().amax(0))
    assert not layer._forward_pre_hooks


@pytest.mark.parametrize("mode", ["fp8_simulated", "int4_simulated", "nvfp4_simulated"])
@torch.no_grad()
def test_the_four_large_projections_and_nothing_else(mode: str):
    dit = tiny.dit(DIT)
    before = dit(*inputs())
    copy = quantized(dit, mode)
    assert {*layers(dit, mode)} == {f"blocks.{i}.{name}" for i in range(2) for name in LARGE}
    assert {n for n, m in copy.named_modules() if isinstance(m, Fp8Linear | LowRankLinear)} == {*layers(dit, mode)}
    assert torch.equal(dit(*inputs()), before)
    assert 0 < tiny.error(copy(*inputs()), before) < 0.5
    assert copy.quantized == mode
    assert quantized(copy, mode) is copy
    with pytest.raises(ValueError, match=f"quantised as '{mode}' already, not 'int8'"):
        quantize(copy, "int8")


@pytest.mark.skipif(module.has_fp8(), reason="looks for a missing device")
def test_fp8_is_refused_where_no_device_has_it():
    with pytest.raises(ValueError, match=r"quantize 'fp8' needs a CUDA device of compute .*fp8_simulated"):
        quantize(tiny.dit(DIT), "fp8")


@torch.no_grad()
def test_fp8_of_a_whole_denoiser_is_its_simulation(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "has_fp8", lambda: True)  # the CPU multiplies e4m3 too, slowly
    velocities: list[Tensor] = []
    for mode in ("fp8", "fp8_simulated"):
        dit: Dit = quantized(tiny.dit(DIT).bfloat16(), mode)
        x, t, text = inputs()
        velocities.append(dit(x, t, type(text)(text.tokens.bfloat16(), text.mask)).float())
    assert tiny.error(*velocities) <= 1e-2


class TestSystem:
    def test_a_rank_is_calibrated_by_sampling(self):
        """Once in place or for one call: the same pictures, nearer to the exact ones with a rank."""
        system = tiny.text2image(dit=DIT).eval()

        def images(**options: Any) -> Tensor:
            return system.sample(["a ring"], size=16, sampling=Sampling("euler", 3, 3.0, **options)).float()

        exact, plain = images(), images(quantize="int4_simulated")
        corrected = images(quantize="int4_simulated", quantize_rank=64)
        assert (corrected - exact).abs().mean() < (plain - exact).abs().mean()
        settled = Sampling("euler", 3, 3.0, quantize="int4_simulated", quantize_rank=64)
        assert system.prepare_for_sampling(settled, "cpu").dit.quantized == "int4_simulated:64"
        assert torch.equal(images(quantize="int4_simulated", quantize_rank=64), corrected)

    def test_a_rank_is_of_four_bits(self):
        with pytest.raises(ValueError, match="quantize_rank is 16, of 4-bit products, and quantize is 'fp8'"):
            Sampling(quantize="fp8", quantize_rank=16)


def test_trials_and_costs():
    """Other trials of the same model; a simulation has no speed."""
    plain = experiments.load("shapes_sana")
    modes = ["sampling.quantize=fp8_simulated", "sampling.quantize=int4_simulated"]
    given = [plain, *(experiments.load("shapes_sana", [m]) for m in modes)]
    given.append(experiments.load("shapes_sana", [modes[1], "sampling.quantize_rank=32"]))
    assert len({hashing.experiment_hash(e) for e in given}) == 1
    assert len({hashing.trial_hash(schema.Trial({}, 0, e)) for e in given}) == 4
    with pytest.raises(SpecError, match="'fp8_simulated', which has no speed"):
        build_untrained(given[1])
