"""Memory that is worked out on the meta device against memory that is followed on the CPU."""

import pytest
import tiny
import torch
from torch import nn

from sana_lab.bench.memory import MemoryCounter, MemoryOptions, long_prompts, no_warnings
from sana_lab.bench.record import COMPONENTS
from sana_lab.costs.live_memory import module_tensors, peak_memory, tensor_bytes
from sana_lab.diffusion.guidance import guided
from sana_lab.diffusion.sampling import Sampling
from sana_lab.systems.text2image import TextToImage
from sana_lab.types import Text

WEIGHTS = [COMPONENTS[stage] for stage in ("text", "denoise", "decode")]


def make(**dit: object) -> TextToImage:
    return tiny.text2image(dit={**tiny.DIT, "dim": 64, "depth": 2, **dit}).eval()


@torch.no_grad()
def followed(system: TextToImage, network: nn.Module, call) -> int:
    """Bytes beside the network's weights in a real call."""
    weights = module_tensors([network])
    return peak_memory(call, "cpu", weights).peak_bytes - tensor_bytes(weights)


@pytest.mark.parametrize("batch", [1, 3])
def test_stages_are_what_real_calls_hold(batch: int):
    """Of the denoiser within a tenth: attention to the caption is one operator on the CPU, and several on meta."""
    system = make()
    found = MemoryCounter(system, 32, batch, guided=True).peak(MemoryOptions()).activations
    latents = torch.randn(batch, 4, 4, 4)
    assert found["decode"] == followed(system, system.autoencoder, lambda: system.pixels(latents))
    text = Text(torch.randn(2 * batch, 16, 32), torch.ones(2 * batch, 16, dtype=torch.bool))
    x, t = torch.randn(2 * batch, 4, 4, 4), torch.rand(2 * batch)
    real = followed(system, system.dit, lambda: system.dit.prepare(text)(x, t))
    assert real <= found["denoise"] < 1.1 * real


def test_the_denoiser_of_real_guidance_holds_no_more():
    system = make()
    found = MemoryCounter(system, 32, 1, guided=True).peak(MemoryOptions()).activations["denoise"]
    text = Text(torch.randn(1, 16, 32), torch.ones(1, 16, dtype=torch.bool))
    x, t = torch.randn(1, 4, 4, 4), torch.rand(1)
    real = followed(system, system.dit, lambda: guided(system.dit, text, text, 3.0)(x, t))
    assert 0.5 * found < real <= found


def test_a_stage_holds_all_weights_or_its_own():
    counter = MemoryCounter(make(), 32, 1, guided=True)
    whole, visiting = counter.peak(MemoryOptions()), counter.peak(MemoryOptions(offload=True))
    weights = [tensor_bytes(module_tensors([getattr(counter.system, name)])) for name in WEIGHTS]
    assert [whole.weights[name] for name in WEIGHTS] == weights
    for stage, name in COMPONENTS.items():
        assert whole.stage(stage) == sum(weights) + whole.activations[stage]
        assert visiting.stage(stage) == whole.weights[name] + whole.activations[stage]
    assert whole.total == max(whole.stage(stage) for stage in COMPONENTS)


def test_tiles_hold_less_and_nothing_is_changed():
    system = make()
    before = dict(system.named_parameters())
    counter = MemoryCounter(system, 64, 1, guided=False)
    assert (
        counter.peak(MemoryOptions(tile=2)).activations["decode"] < counter.peak(MemoryOptions()).activations["decode"]
    )
    assert system.autoencoder.tile is None
    assert all(t is before[n] and t.device.type == "cpu" for n, t in system.named_parameters())
    assert system.text_encoder.warnings_left == type(system.text_encoder).warnings_left


def test_guidance_costs_rows():
    both, alone = (MemoryCounter(make(), 32, 1, guided).peak(MemoryOptions()).activations for guided in (True, False))
    assert both["denoise"] > 1.5 * alone["denoise"]
    assert both["decode"] == alone["decode"]


def test_int8_weighs_what_it_weighs():
    pytest.importorskip("torchao")
    counter = MemoryCounter(make(), 32, 1, guided=True)
    plain, small, both = (counter.peak(MemoryOptions(how)) for how in ("none", "int8", "w8a8"))
    assert small.weights["dit"] < both.weights["dit"] < plain.weights["dit"]
    assert counter.system.dit.quantized == "none"
    real = make()
    from sana_lab.systems.quantize import quantize

    assert small.weights["dit"] == tensor_bytes(module_tensors([quantize(real.dit, "int8")]))
    assert (
        MemoryCounter(real, 32, 1, guided=True).peak(MemoryOptions("int8")) == small
    )  # of one that is quantised already


def test_what_does_not_fit_here_is_counted_too():
    """A decoder's activations of 2 TB."""
    system = make()
    found = MemoryCounter(system, 2**17, 1, guided=False)._decode(None)
    assert found[1] > 8 * 2**34 * 4


def measured(system: TextToImage, options: MemoryOptions, size: int) -> int:
    """Peak bytes of sampling on a GPU by the allocator; two eager steps, as CUDA graphs have memory of their own."""
    sampling = Sampling(steps=2, quantize=options.quantize, offload=options.offload, graph="never")
    system.autoencoder.tile = options.tile
    system.prepare_for_sampling(sampling, "cuda")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats("cuda")
    with no_warnings(system.text_encoder):
        system.sample(long_prompts(system.text_encoder, 1), size=size, sampling=sampling)
    torch.cuda.synchronize("cuda")
    return torch.cuda.max_memory_allocated("cuda")


@pytest.mark.gpu
def test_a_gpu_holds_what_was_worked_out():
    """Of a system whose tensors are larger than the allocator's blocks; operators there may keep less or more."""
    system = make(dim=512, depth=4).bfloat16()
    for way in (MemoryOptions(), MemoryOptions(offload=True), MemoryOptions(offload=True, tile=8)):
        expected = MemoryCounter(system, 512, 1, guided=True).peak(way).total
        assert 0.5 * expected < measured(system, way, 512) < 1.3 * expected + 32 * 2**20
