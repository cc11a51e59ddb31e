"""The KL autoencoder against diffusers' AutoencoderKL, and its own promises."""

import re
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from sana_lab.config import specs
from sana_lab.models.autoencoders.presets import SPECS
from sana_lab.models.autoencoders.vae import Vae

SPEC = {**tiny.VAE, "widths": [8, 16, 16], "groups": 4}


def renamed(key: str, depth: int, stages: int) -> str:
    """diffusers' key for one of ours, the middle's q, k and v aside."""
    match = re.match(r"^(en|de)coder\.stages\.(\d+)\.(\d+)\.(.*)$", key)
    if match:
        return _staged(match[1] + "coder", int(match[2]), int(match[3]), match[4], depth, stages)
    rules = [
        (r"coder\.stem\.", "coder.conv_in."),
        (r"coder\.head\.0\.", "coder.conv_norm_out."),
        (r"coder\.head\.2\.", "coder.conv_out."),
        (r"coder\.middle\.1\.norm\.", "coder.mid_block.attentions.0.group_norm."),
        (r"coder\.middle\.1\.out\.", "coder.mid_block.attentions.0.to_out.0."),
        (r"coder\.middle\.1\.", "coder.mid_block.attentions.0."),
        (r"coder\.middle\.0\.", "coder.mid_block.resnets.0."),
        (r"coder\.middle\.2\.", "coder.mid_block.resnets.1."),
        (r"^quant\.", "quant_conv."),
        (r"^post_quant\.", "post_quant_conv."),
        (r"\.skip\.", ".conv_shortcut."),
    ]
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def _staged(half: str, stage: int, block: int, rest: str, depth: int, stages: int) -> str:
    """Our encoder stage begins with its downsampling; diffusers ends the stage before with it."""
    rest = rest.replace("skip.", "conv_shortcut.")
    if half == "decoder":
        where = f"decoder.up_blocks.{stages - 1 - stage}"
        return f"{where}.upsamplers.0.{rest}" if block == depth + 1 else f"{where}.resnets.{block}.{rest}"
    if stage and block == 0:
        return f"encoder.down_blocks.{stage - 1}.downsamplers.0.{rest}"
    return f"encoder.down_blocks.{stage}.resnets.{block - bool(stage)}.{rest}"


NORMALISATION = ("shift", "scale")


def their_keys(key: str, depth: int, stages: int) -> list[str]:
    """diffusers' keys of one of ours: three for qkv."""
    name = renamed(key, depth, stages)
    return [name.replace(".qkv.", f".to_{x}.") for x in "qkv"] if ".qkv." in key else [name]


def ours_from(theirs: dict[str, Tensor], model: Vae, depth: int, stages: int) -> dict[str, Tensor]:
    out = {}
    for key, value in model.state_dict().items():
        tensors = [value] if key in NORMALISATION else [theirs[name] for name in their_keys(key, depth, stages)]
        out[key] = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    return out


@pytest.mark.parametrize(("depth", "quant"), [(1, True), (2, False)])
def test_equals_diffusers(depth, quant):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    stages = len(SPEC["widths"])
    theirs = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        block_out_channels=tuple(SPEC["widths"]),
        layers_per_block=depth,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
    ).eval()
    tiny.scatter(theirs)
    model = tiny.autoencoder(SPEC, depth=depth, quant=quant)
    model.load_state_dict(ours_from(theirs.state_dict(), model, depth, stages))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in theirs.parameters())
    images = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        posterior = theirs.encode(images).latent_dist
        mean, log_variance = model.posterior(images)
        torch.testing.assert_close(mean, posterior.mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(log_variance, posterior.logvar, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.reconstruct(mean), theirs.decode(mean).sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
@pytest.mark.parametrize("attention", [True, False])
def test_any_multiple_of_the_downsampling(size, attention):
    model = tiny.autoencoder(SPEC, middle_attention=attention)
    latents = model.encode(torch.randn(2, 3, *size))
    assert latents.shape == (2, 4, size[0] // 4, size[1] // 4)
    assert model.decode(latents).shape == (2, 3, *size)


# --- the published configurations

FOUR = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
}
SIXTEEN = FOUR | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}

PUBLISHED: dict[str, dict[str, Any]] = {
    "vae_sd1": FOUR | {"scaling_factor": 0.18215},
    "vae_sdxl": FOUR | {"scaling_factor": 0.13025},
    "vae_sd3": SIXTEEN | {"scaling_factor": 1.5305, "shift_factor": 0.0609},
    "vae_flux": SIXTEEN | {"scaling_factor": 0.3611, "shift_factor": 0.1159},
}
"""config.json of each model's `vae` folder as AutoencoderKL takes it; known, not read from the hub here."""


def test_every_named_vae_is_published_and_normalises_as_its_model_does():
    assert {name for name in SPECS if name.startswith("vae")} - {"vae_f16c32"} == PUBLISHED.keys()
    for name, config in PUBLISHED.items():
        spec = specs.resolve("autoencoder", name)
        assert (spec["shift"], spec["scale"]) == (config.get("shift_factor", 0.0), config["scaling_factor"])


@pytest.mark.parametrize("name", ["vae_sdxl", "vae_flux"])  # the others differ in shift and scale alone
def test_full_size_has_the_keys_and_shapes_of_diffusers(name):
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKL(**PUBLISHED[name]).state_dict()
        model = specs.build("autoencoder", name)
    sources = {key: their_keys(key, 2, 4) for key in model.state_dict() if key not in NORMALISATION}
    assert {key for keys in sources.values() for key in keys} == theirs.keys()
    for key, keys in sources.items():
        assert model.state_dict()[key].numel() == sum(theirs[k].numel() for k in keys), key
        assert model.state_dict()[key].shape[1:] == theirs[keys[0]].shape[1:], key


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-8)])
@pytest.mark.parametrize(("name", "backend"), [*((name, "torch") for name in PUBLISHED), ("vae_sdxl", "fast")])
def test_published_layouts_equal_diffusers(name, dtype, tolerance, backend):
    """Encode and decode, normalised as the pipelines do; widths an eighth, the layout is the real one."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    config = PUBLISHED[name] | {"block_out_channels": (16, 32, 64, 64), "norm_num_groups": 4}
    theirs = diffusers.AutoencoderKL(**config).to(dtype).eval()
    tiny.scatter(theirs)
    spec = {**specs.resolve("autoencoder", name), "widths": [16, 32, 64, 64], "groups": 4, "backend": backend}
    model = specs.build("autoencoder", spec).to(dtype).eval()
    model.load_state_dict(ours_from(theirs.state_dict(), model, 2, 4))
    images = torch.randn(1, 3, 32, 48, dtype=dtype)
    with torch.no_grad():
        z = theirs.encode(images).latent_dist.mode()
        image = theirs.decode(z).sample
        assert tiny.relative(model.posterior(images)[0], z) <= tolerance
        assert tiny.relative(model.reconstruct(z), image) <= tolerance
        latents = (z - (theirs.config.shift_factor or 0.0)) * theirs.config.scaling_factor
        assert tiny.relative(model.encode(images), latents) <= tolerance
        assert tiny.relative(model.decode(latents), image) <= tolerance


def test_the_f16_shape_is_our_own():
    with torch.device("meta"):
        model = specs.build("autoencoder", "vae_f16c32")
        z = model.encode(torch.empty(1, 3, 64, 96))
        assert z.shape == (1, 32, 4, 6)
        assert model.decode(z).shape == (1, 3, 64, 96)


def test_defaults_are_stable_diffusions_autoencoder():
    with torch.device("meta"):
        model = Vae()
    assert (model.channels, model.downsample) == (4, 8)
    assert sum(p.numel() for p in model.parameters()) == 83_653_863  # SD 1.x: 83.65 M


def test_every_parameter_gets_a_gradient():
    model = tiny.autoencoder(SPEC)
    mean, log_variance = model.posterior(torch.randn(2, 3, 16, 16))
    (model.reconstruct(mean).square().sum() + log_variance.square().sum()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [({"groups": 3}, r"width 8 is not a multiple of groups 3; the nearest is 9"), ({"depth": 0}, "expected int in")],
)
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        tiny.autoencoder(SPEC, **change)
