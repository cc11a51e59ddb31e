"""Tiled autoencoders against the same ones untiled: no seam at any size, and less memory."""

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from sana_lab.config import specs
from sana_lab.costs.live_memory import peak_memory
from sana_lab.models.autoencoders import Autoencoder
from sana_lab.models.autoencoders.tiling import Tiled

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
LAYOUTS = [f"dcae_{name}" for name in ("f32c32_sana_1_1", "lite_f32c32_sana_1_1", "f32c32_mix_1_0", "f64c128_mix_1_0",
                                       "f128c512_mix_1_0")]  # fmt: skip
DEPTHS = {"encoder_depths": [1] * 5, "decoder_depths": [1] * 5}
FIVE = {"name": "dcae", "widths": [8, 8, 16, 16, 16], "latent": 8, "head_dim": 8, "multiscales": [3, 5], **DEPTHS}
VAE = {**tiny.VAE, "widths": [8, 8, 16], "groups": 4}


def built(spec: dict[str, Any], dtype: torch.dtype = torch.float64) -> Autoencoder:
    """With random weights in which every branch counts, in evaluation."""
    model = tiny.autoencoder(spec).to(dtype)
    tiny.scatter(model)
    return model


def reduced(name: str, depth: int = 2) -> dict[str, Any]:
    """A published layout at a sixteenth of its widths, at most so many blocks a stage."""
    spec = specs.resolve("autoencoder", name)
    depths = {k: [min(d, depth) for d in spec[k]] for k in ("encoder_depths", "decoder_depths")}
    widths = [w // 16 for w in spec["widths"]]
    return {**spec, **depths, "widths": widths, "latent": spec["latent"] // 4, "head_dim": 8}


def errors(model: Autoencoder, height: int, width: int, tile: int) -> tuple[float, float]:
    """Largest relative error of tiled encoding and decoding of so many latents."""
    dtype = next(model.parameters()).dtype
    images = torch.randn(1, 3, height * model.downsample, width * model.downsample, dtype=dtype)
    latents = torch.randn(1, model.channels, height, width, dtype=dtype)
    with torch.no_grad():
        model.tile = None
        whole = model.encode(images), model.decode(latents)
        model.tile = tile
        tiled = model.encode(images), model.decode(latents)
    return relative(tiled[0], whole[0]), relative(tiled[1], whole[1])


def relative(a: Tensor, b: Tensor) -> float:
    assert b.std() > 1e-3
    return tiny.relative(a, b)


# --- equal to the untiled result


@pytest.mark.parametrize("name", LAYOUTS)
def test_published_dcae(name):
    model = built(reduced(name))
    height, width, tile = (3, 2, 2) if model.downsample == 32 else (2, 1, 1)
    assert max(errors(model, height, width, tile)) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize(("down", "up"), [("conv", "interpolate"), ("unshuffle", "shuffle")])
@pytest.mark.parametrize(("first", "attention"), [(0, 0), (0, 2), (1, 1), (1, 5)])
def test_dcae(down, up, first, attention):
    """Stems folded or not; without attention, with it on coarse grids, and everywhere."""
    depths = [first, 2, 1, 1, 2]
    spec = {**FIVE, "encoder_depths": depths, "decoder_depths": depths, "attention_stages": attention}
    model = built({**spec, "down": down, "up": up})
    assert max(errors(model, 5, 3, tile=2)) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("name", ["vae_sd1", "vae_flux"])
def test_published_vae(name):
    spec = specs.resolve("autoencoder", name)
    model = built({**spec, "widths": [w // 16 for w in spec["widths"]], "groups": 4})
    assert max(errors(model, 7, 4, tile=3)) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("spec", [reduced(LAYOUTS[0]), reduced(LAYOUTS[2]), VAE], ids=["sana", "mix", "vae"])
def test_float32(spec):
    assert max(errors(built(spec, torch.float32), 5, 3, tile=2)) <= TOLERANCE[torch.float32]


def test_images_of_a_batch_do_not_mix():
    """Statistics of norms and states of attention are each image's own."""
    for spec in (VAE, FIVE):
        model = built({**spec, "tile": 2})
        latents = torch.randn(2, model.channels, 3, 3).double()
        with torch.no_grad():
            assert relative(model.decode(latents)[1:], model.decode(latents[1:])) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("up", ["interpolate", "shuffle"])
def test_the_margin_is_no_wider_than_it_must_be(up, monkeypatch):
    """With a cell less there is a seam: the test would see one."""
    model = built({**FIVE, "up": up, "attention_stages": 2})
    margin = Tiled.margin
    monkeypatch.setattr(Tiled, "margin", lambda self: max(0, margin(self) - (self.up == 8)))
    assert errors(model, 8, 2, tile=2)[1] > 100 * TOLERANCE[torch.float64]


@pytest.mark.parametrize("spec", [VAE, FIVE], ids=["vae", "dcae"])
def test_gradients(spec):
    model = built(spec)
    latents = torch.randn(1, model.channels, 3, 2, dtype=torch.float64, requires_grad=True)
    gradients = []
    for tile in (None, 2):
        model.tile = tile
        gradients += torch.autograd.grad(model.decode(latents).square().mean(), latents)
    assert relative(gradients[1], gradients[0]) <= 10 * TOLERANCE[torch.float64]


# --- memory


@pytest.mark.parametrize(
    ("spec", "size", "tile", "bar"),
    [(reduced(LAYOUTS[0], depth=1), 512, 4, 0.25), (VAE, 256, 16, 0.33)],
    ids=["dcae", "vae"],
)
def test_peak_memory_is_a_fraction(spec, size, tile, bar):
    """Of decoding and of encoding, without the weights; what stays are whole grids an eighth (vae: half) as fine."""
    model = built(spec, torch.float32)
    side = size // model.downsample
    inputs = torch.randn(1, model.channels, side, side), torch.randn(1, 3, size, size)
    for call, x in zip((model.decode, model.encode), inputs, strict=True):
        model.tile = None
        whole = peak(model, call, x)
        model.tile = tile
        assert peak(model, call, x) <= bar * whole


def peak(model: Autoencoder, call: Any, x: Tensor) -> int:
    with torch.no_grad():
        memory = peak_memory(lambda: call(x), "cpu", [x, *model.parameters(), *model.buffers()])
    return memory.peak_bytes - memory.resident_bytes


# --- the option


@pytest.mark.parametrize("spec", [VAE, FIVE], ids=["vae", "dcae"])
def test_the_option_changes_no_hash_and_no_state(spec):
    assert specs.canonical("autoencoder", {**spec, "tile": 4}) == specs.canonical("autoencoder", spec)
    assert "tile" not in specs.canonical("autoencoder", spec)
    with torch.device("meta"):
        models = [specs.build("autoencoder", {**spec, "tile": tile}) for tile in (None, 4)]
    assert models[0].state_dict().keys() == models[1].state_dict().keys()


def test_small_images_and_training_go_through_whole():
    model = built({**FIVE, "tile": 4})
    assert [model.tile_for(grid) for grid in ((4, 4), (5, 1), (1, 5))] == [None, 4, 4]
    assert model.train().tile_for((5, 5)) is None


@pytest.mark.parametrize("name", ["vae", "dcae"])
def test_a_tile_of_nothing_is_refused(name):
    with pytest.raises(ValueError, match=r"tile is 0 \(int\), expected int in \[1, 32768\] \| None; the nearest is 1"):
        specs.build("autoencoder", {"name": name, "tile": 0})
