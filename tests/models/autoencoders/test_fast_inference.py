"""Ways of computing an autoencoder's inference: one result, nothing kept, nothing changed for training."""

import copy
import io
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from sana_lab.config import specs
from sana_lab.models.autoencoders import Autoencoder
from sana_lab.ops.conv import reference as op

DCAE = {**tiny.DCAE, "widths": [32, 32, 64], "encoder_depths": [1, 1, 1], "decoder_depths": [1, 1, 2], "head_dim": 16}
FOLDED = {
    **DCAE,
    "encoder_depths": [0, 1, 1],
    "decoder_depths": [0, 2, 1],
    "down": "unshuffle",
    "up": "shuffle",
    "batch_norm_stages": 1,
}
VAE = {**tiny.VAE, "widths": [32, 32, 64], "groups": 8}
SPECS = [DCAE, FOLDED, VAE]
NAMES = ["dcae", "dcae-folded", "vae"]
LARGE = 64  # pixels: over 512 tiles of 4 x 4 in two images, enough for `auto` to take Winograd


def built(spec: dict[str, Any], dtype: torch.dtype = torch.float32, **options: Any) -> Autoencoder:
    """With norms away from one and zero, ready for inference; the same for every call."""
    model = tiny.autoencoder(spec, **options)
    tiny.scatter(model)
    return model.to(dtype)


def both(model: Autoencoder, size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """What it makes of an image and of latents, not square."""
    generator = torch.Generator().manual_seed(1)
    height, width = size, size + 3 * model.downsample
    images = torch.rand(2, 3, height, width, generator=generator, dtype=torch.float64).to(dtype) * 2 - 1
    grid = height // model.downsample, width // model.downsample
    latents = torch.randn(2, model.channels, *grid, generator=generator, dtype=torch.float64).to(dtype)
    with torch.no_grad():
        return model.encode(images), model.decode(latents)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
@pytest.mark.parametrize("size", [16, LARGE])
def test_one_result(spec, dtype, tolerance, size):
    truth = both(built(spec, torch.float64, backend="torch"), size, torch.float64)
    for backend in ("torch", "auto", "fast"):
        results = both(built(spec, dtype, backend=backend), size, dtype)
        assert all(x.dtype == dtype for x in results)
        assert max(tiny.error(x.double(), y) for x, y in zip(results, truth, strict=True)) <= tolerance


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_tiles_of_a_fast_one(spec):
    whole = both(built(spec, backend="fast"), 64)
    tiled = both(built(spec, backend="fast", tile=5), 64)
    assert max(float((x - y).abs().max()) for x, y in zip(tiled, whole, strict=True)) <= 1e-5


def test_auto_takes_the_fast_form_without_gradients_alone(monkeypatch):
    calls: list[Tensor] = []
    operator = op.operator
    monkeypatch.setattr(op, "operator", lambda x, *rest: calls.append(x) or operator(x, *rest))
    model = built(DCAE)
    both(model, LARGE)
    assert len(calls) >= 2
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in calls)
    calls.clear()
    model.decode(torch.randn(1, model.channels, LARGE // 2, LARGE // 2))
    assert calls == []


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_training_is_the_same_to_the_last_bit(spec):
    results = []
    for backend in ("auto", "torch"):
        model = built(spec, backend=backend).train()
        images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
        model.decode(model.encode(images)).square().mean().backward()
        results.append([p.grad for p in model.parameters()])
    assert all(a.equal(b) for a, b in zip(*results, strict=True) if a is not None and b is not None)
    assert results[0][0] is not None


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_weights_that_change_are_seen_at_once(spec):
    """By an optimiser, by loading, behind autograd's back, and by moving to another dtype."""
    model, other = built(spec, backend="fast"), built(spec, backend="torch")
    both(model, 32)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    other.load_state_dict(model.state_dict())
    assert tiny.error(both(model, 32)[1], both(other, 32)[1]) <= 5e-6
    for m in (model, other):
        for p in m.parameters():
            p.data.mul_(1.1)
    assert tiny.error(both(model, 32)[1], both(other, 32)[1]) <= 5e-6
    assert tiny.error(both(model.double(), 32, torch.float64)[1], both(other.double(), 32, torch.float64)[1]) <= 1e-12


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_nothing_is_kept(spec):
    """A model that has been used is saved and copied as a fresh one is."""
    used, fresh = built(spec, backend="fast"), built(spec, backend="torch")
    both(used, 32)
    assert used.state_dict().keys() == fresh.state_dict().keys()
    assert size_of(used) == pytest.approx(size_of(fresh), rel=0.01)
    assert both(copy.deepcopy(used), 32)[1].equal(both(used, 32)[1])


def size_of(model: nn.Module) -> int:
    file = io.BytesIO()
    torch.save(model, file)
    return file.tell()


@pytest.mark.parametrize("backend", ["auto", "fast"])
def test_in_inference_mode_and_with_more_threads(backend):
    before = torch.get_num_threads()
    expected = both(built(DCAE, backend=backend), LARGE)
    try:
        torch.set_num_threads(2)
        with torch.inference_mode():
            results = both(built(DCAE, backend=backend), LARGE)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert max(tiny.error(x, y) for x, y in zip(results, expected, strict=True)) <= 5e-6


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_the_option_enters_no_hash(spec):
    assert specs.canonical("autoencoder", {**spec, "backend": "torch"}) == specs.canonical("autoencoder", spec)


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_an_explicit_fast_records_no_gradient(spec):
    model = built(spec, backend="fast")
    with pytest.raises(ValueError, match="'fast' records no gradient"):
        model.decode(torch.randn(1, model.channels, 8, 8))


@pytest.mark.parametrize("name", ["dcae", "vae"])
def test_an_unknown_backend_is_refused_while_it_loads(name):
    with pytest.raises(specs.SpecError, match="backend"):
        specs.resolve("autoencoder", {"name": name, "backend": "winograd"})


def test_the_fast_form_is_one_graph_to_torch_compile():
    model = built(DCAE, backend="fast")
    latents = torch.randn(1, model.channels, 4, 6)
    with torch.no_grad():
        compiled = torch.compile(model.decode, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(latents), model.decode(latents), rtol=0, atol=1e-6)
