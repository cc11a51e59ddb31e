"""DC-AE against diffusers' AutoencoderDC, naive attention, and its own promises."""

import re
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sana_lab.config import specs
from sana_lab.models.autoencoders.dcae import DcAe
from sana_lab.models.autoencoders.dcae_blocks import average_channels, relu_attention, repeat_channels
from sana_lab.models.autoencoders.presets import SPECS


def renamed(key: str) -> str:
    """diffusers' key for one of ours, q, k and v aside."""
    rules = [
        (r"^encoder\.stem\.", "encoder.conv_in."),
        (r"^decoder\.stem\.", "decoder.conv_in."),
        (r"^encoder\.stages\.", "encoder.down_blocks."),
        (r"^decoder\.stages\.", "decoder.up_blocks."),
        (r"^(en|de)coder\.head\.", r"\1coder.conv_out."),
        (r"^decoder\.norm\.", "decoder.norm_out."),
        (r"\.attention\.scales\.(\d+)\.0\.", r".attn.to_qkv_multiscale.\1.proj_in."),
        (r"\.attention\.scales\.(\d+)\.1\.", r".attn.to_qkv_multiscale.\1.proj_out."),
        (r"\.attention\.out\.", ".attn.to_out."),
        (r"\.attention\.norm\.", ".attn.norm_out."),
        (r"\.ffn\.inverted\.", ".conv_out.conv_inverted."),
        (r"\.ffn\.depthwise\.", ".conv_out.conv_depth."),
        (r"\.ffn\.point\.", ".conv_out.conv_point."),
        (r"\.ffn\.norm\.", ".conv_out.norm."),
    ]
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def shifted(key: str, depths: list[int]) -> str:
    """Our encoder stage begins with its downsampling; diffusers ends the stage before with it."""
    match = re.match(r"^encoder\.stages\.(\d+)\.(\d+)\.(.*)$", key)
    if not match:
        return key
    stage, block, rest = int(match[1]), int(match[2]), match[3]
    if stage == 0 or depths[stage - 1] == 0:
        return key
    if block == 0:
        return f"encoder.stages.{stage - 1}.{depths[stage - 1]}.{rest}"
    return f"encoder.stages.{stage}.{block - 1}.{rest}"


NORMALISATION = ("shift", "scale")


def their_keys(key: str, depths: list[int]) -> list[str]:
    """diffusers' keys of one of ours: three for qkv."""
    name = renamed(shifted(key, depths))
    return [name.replace(".attention.qkv.", f".attn.to_{x}.") for x in "qkv"] if ".attention.qkv." in key else [name]


def ours_from(theirs: dict[str, Tensor], model: DcAe, depths: list[int]) -> dict[str, Tensor]:
    out = {}
    for key, value in model.state_dict().items():
        tensors = [value] if key in NORMALISATION else [theirs[name] for name in their_keys(key, depths)]
        out[key] = (torch.cat(tensors) if len(tensors) > 1 else tensors[0]).reshape(value.shape)
    return out


@pytest.mark.parametrize(
    ("encoder", "decoder", "down", "up", "scales"),
    [
        ([1, 1, 1], [1, 1, 2], "conv", "interpolate", [5]),
        ([2, 1, 1], [1, 2, 1], "unshuffle", "shuffle", []),
        ([0, 1, 1], [0, 1, 1], "unshuffle", "shuffle", [3, 5]),
        ([0, 1, 2], [0, 2, 1], "conv", "interpolate", []),
    ],
)
@pytest.mark.parametrize("size", [8, 32])  # 4 tokens take the quadratic order, 64 the linear one
def test_equals_diffusers(encoder, decoder, down, up, scales, size):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    kinds = ("ResBlock", "ResBlock", "EfficientViTBlock")
    multiscales = ((), (), tuple(scales))
    theirs = diffusers.AutoencoderDC(
        latent_channels=8,
        attention_head_dim=8,
        encoder_block_types=kinds,
        decoder_block_types=kinds,
        encoder_block_out_channels=tuple(tiny.DCAE["widths"]),
        decoder_block_out_channels=tuple(tiny.DCAE["widths"]),
        encoder_layers_per_block=tuple(encoder),
        decoder_layers_per_block=tuple(decoder),
        encoder_qkv_multiscales=multiscales,
        decoder_qkv_multiscales=multiscales,
        downsample_block_type="Conv" if down == "conv" else "pixel_unshuffle",
        upsample_block_type="interpolate" if up == "interpolate" else "pixel_shuffle",
    ).eval()
    tiny.scatter(theirs)
    options = {"encoder_depths": encoder, "decoder_depths": decoder, "multiscales": scales, "down": down, "up": up}
    model = tiny.autoencoder(tiny.DCAE, **options)
    state = ours_from(theirs.state_dict(), model, encoder)
    model.load_state_dict(state)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in theirs.parameters())
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        z = theirs.encode(images).latent
        torch.testing.assert_close(model.posterior(images)[0], z, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.reconstruct(z), theirs.decode(z).sample, rtol=1e-4, atol=1e-5)


# --- the published configurations


def published(stages: int, attention: int, scales: list[int], **more: Any) -> dict[str, Any]:
    """A config.json of AutoencoderDC: residual stages, then `attention` EfficientViT stages."""
    blocks = ["ResBlock"] * (stages - attention) + ["EfficientViTBlock"] * attention
    widths = [128, 256, 512, 512, 1024, 1024, 2048, 2048][:stages]
    kernels = [[] for _ in range(stages - attention)] + [scales] * attention
    return {
        "encoder_block_types": blocks,
        "decoder_block_types": blocks,
        "encoder_block_out_channels": widths,
        "decoder_block_out_channels": widths,
        "encoder_qkv_multiscales": kernels,
        "decoder_qkv_multiscales": kernels,
        **more,
    }


def imagenet(deep: int, latent: int, scale: float) -> dict[str, Any]:
    """The `in` and `mix` family, with `deep` EfficientViT stages."""
    return published(
        3 + deep,
        deep,
        [],
        latent_channels=latent,
        encoder_layers_per_block=[0, 4, 8, *[2] * deep],
        decoder_layers_per_block=[0, 5, 10, *[2] * deep],
        downsample_block_type="pixel_unshuffle",
        upsample_block_type="pixel_shuffle",
        decoder_norm_types=["batch_norm"] * 3 + ["rms_norm"] * deep,
        decoder_act_fns=["relu"] * 3 + ["silu"] * deep,
        scaling_factor=scale,
    )


SANA = published(
    6,
    3,
    [5],
    latent_channels=32,
    encoder_layers_per_block=[2, 2, 2, 3, 3, 3],
    decoder_layers_per_block=[3, 3, 3, 3, 3, 3],
    downsample_block_type="Conv",
    upsample_block_type="interpolate",
    decoder_norm_types="rms_norm",
    decoder_act_fns="silu",
    scaling_factor=0.41407,
)

LITE = SANA | {
    "decoder_block_types": ["ResBlock"] * 6,
    "decoder_layers_per_block": [0, 3, 5, 4, 4, 4],
    "decoder_qkv_multiscales": [[]] * 6,
    "upsample_block_type": "pixel_shuffle",
    "decoder_conv_act_fn": "silu",
}

PUBLISHED = {
    "dcae_f32c32_sana_1_0": SANA,
    "dcae_f32c32_sana_1_1": SANA,
    "dcae_lite_f32c32_sana_1_1": LITE,
    "dcae_f32c32_in_1_0": imagenet(3, 32, 0.3189),
    "dcae_f32c32_mix_1_0": imagenet(3, 32, 0.4552),
    "dcae_f64c128_in_1_0": imagenet(4, 128, 0.2889),
    "dcae_f64c128_mix_1_0": imagenet(4, 128, 0.4538),
    "dcae_f128c512_in_1_0": imagenet(5, 512, 0.4883),
    "dcae_f128c512_mix_1_0": imagenet(5, 512, 0.3620),
}
"""As AutoencoderDC takes them, from diffusers' scripts/convert_dcae_to_diffusers.py (in, mix, sana-1.0), DC-Gen's
dc_ae.py (sana-1.1 and lite, in its own words) and, for the scales, the models' config.json as others quote them."""


LAYOUTS = [f"dcae_{name}" for name in ("f32c32_sana_1_1", "lite_f32c32_sana_1_1", "f32c32_mix_1_0", "f64c128_mix_1_0",
                                       "f128c512_mix_1_0")]  # fmt: skip
"""One of each shape; the others differ in the scale alone."""


def test_every_named_dcae_is_published_and_normalises_as_its_model_does():
    ours = {name for name in SPECS if name.startswith("dcae")}
    assert ours - {"dcae_f16c32", "dcae_f8c16"} == PUBLISHED.keys()  # which nobody published
    for name, config in PUBLISHED.items():
        spec = specs.resolve("autoencoder", name)
        assert (spec["shift"], spec["scale"]) == (0.0, config["scaling_factor"])


@pytest.mark.parametrize("name", LAYOUTS)
def test_full_size_has_the_keys_and_shapes_of_diffusers(name):
    diffusers = pytest.importorskip("diffusers")
    spec = specs.resolve("autoencoder", name)
    with torch.device("meta"):
        theirs = diffusers.AutoencoderDC(**PUBLISHED[name]).state_dict()
        model = specs.build("autoencoder", name)
    sources = {key: their_keys(key, spec["encoder_depths"]) for key in model.state_dict() if key not in NORMALISATION}
    assert {key for keys in sources.values() for key in keys} == theirs.keys()
    for key, keys in sources.items():
        tensors = torch.cat([theirs[k] for k in keys]) if len(keys) > 1 else theirs[keys[0]]
        assert model.state_dict()[key].shape[:2] == tensors.shape[:2], key
        assert model.state_dict()[key].numel() == tensors.numel(), key
    assert model.channels == PUBLISHED[name]["latent_channels"]


def reduced(name: str, backend: str = "auto") -> tuple[dict[str, Any], DcAe]:
    """The same cuts made to diffusers' configuration and to our spec; the layout is the real one.

    Widths a sixteenth, heads and latents a quarter, at most two blocks a stage.
    """
    theirs, ours = dict(PUBLISHED[name]), specs.resolve("autoencoder", name)
    for half in ("encoder", "decoder"):
        theirs[f"{half}_block_out_channels"] = [w // 16 for w in theirs[f"{half}_block_out_channels"]]
        theirs[f"{half}_layers_per_block"] = [min(d, 2) for d in theirs[f"{half}_layers_per_block"]]
        ours[f"{half}_depths"] = [min(d, 2) for d in ours[f"{half}_depths"]]
    latent = theirs["latent_channels"] // 4
    theirs |= {"latent_channels": latent, "attention_head_dim": 8}
    widths = [w // 16 for w in ours["widths"]]
    ours |= {"widths": widths, "latent": latent, "head_dim": 8, "backend": backend}
    return theirs, specs.build("autoencoder", ours)


class InFloat64(TorchFunctionMode):
    """Where diffusers goes from float64 down to float32 on the way, it stays."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.to and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-8)])
@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "torch") for name in LAYOUTS), (LAYOUTS[0], "fast"), (LAYOUTS[2], "fast")]
)
def test_published_layouts_equal_diffusers(name, dtype, tolerance, backend):
    """Encode and decode."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    config, model = reduced(name, backend)
    theirs = diffusers.AutoencoderDC(**config).to(dtype).eval()
    tiny.scatter(theirs)
    model = model.to(dtype).eval()
    model.load_state_dict(ours_from(theirs.state_dict(), model, config["encoder_layers_per_block"]))
    height, width = (2, 3) if model.downsample == 32 else (1, 2)  # latents
    images = torch.randn(1, 3, height * model.downsample, width * model.downsample, dtype=dtype)
    with torch.no_grad(), InFloat64():
        z = theirs.encode(images).latent
        image = theirs.decode(z).sample
    with torch.no_grad():
        assert tiny.relative(model.posterior(images)[0], z) <= tolerance
        assert tiny.relative(model.reconstruct(z), image) <= tolerance
        latents = z * theirs.config.scaling_factor
        assert tiny.relative(model.encode(images), latents) <= tolerance
        assert tiny.relative(model.decode(latents), image) <= tolerance


@pytest.mark.parametrize(("name", "downsample", "latent"), [("dcae_f16c32", 16, 32), ("dcae_f8c16", 8, 16)])
def test_shapes_of_our_own(name, downsample, latent):
    with torch.device("meta"):
        model = specs.build("autoencoder", name)
        z = model.encode(torch.empty(1, 3, 64, 96))
        assert z.shape == (1, latent, 64 // downsample, 96 // downsample)
        assert model.decode(z).shape == (1, 3, 64, 96)


def test_a_named_spec_is_its_part_with_options_and_both_have_one_hash():
    named = specs.resolve("autoencoder", {"name": "dcae_f32c32_sana_1_1", "latent": 16})
    assert (named["name"], named["latent"], named["scale"]) == ("dcae", 16, 0.41407)
    assert specs.canonical("autoencoder", "dcae_f32c32_sana_1_1") == specs.canonical(
        "autoencoder", {"name": "dcae", "scale": 0.41407}
    )
    with pytest.raises(specs.SpecError, match="did you mean 'dcae_f32c32_sana_1_1'"):
        specs.resolve("autoencoder", "dcae_f32c32_sana_11")
    assert specs.find("autoencoder", "dcae_f32c32_sana_1_1") is DcAe


# --- mathematics


@pytest.mark.parametrize("tokens", [3, 8, 9, 40])
def test_relu_attention_is_weighted_average(tokens):
    q, k, v = torch.randn(3, 2, 3, 8, tokens)
    expected = torch.zeros(2, 3, 8, tokens)
    for i in range(tokens):
        weights = (q[..., i].relu()[..., None] * k.relu()).sum(-2)  # (B, G, N)
        expected[..., i] = (v * weights[..., None, :]).sum(-1) / (weights.sum(-1)[..., None] + 1e-15)
    torch.testing.assert_close(relu_attention(q, k, v), expected, rtol=1e-4, atol=1e-5)


def test_relu_attention_of_dead_keys_is_zero():
    q, v = torch.randn(2, 1, 1, 8, 20)
    assert relu_attention(q, -torch.ones(1, 1, 8, 20), v).abs().max() == 0
    assert relu_attention(q[..., :4], -torch.ones(1, 1, 8, 4), v[..., :4]).abs().max() == 0


def test_channel_shortcuts_undo_each_other():
    x = torch.randn(2, 6, 3, 3)
    assert torch.allclose(average_channels(repeat_channels(x, 24), 6), x)
    assert repeat_channels(x, 12)[:, 3].equal(x[:, 1])


@pytest.mark.parametrize("size", [(16, 16), (8, 24), (64, 32)])
def test_any_multiple_of_the_downsampling(size):
    model = tiny.autoencoder(tiny.DCAE)
    latents = model.encode(torch.randn(2, 3, *size))
    assert latents.shape == (2, 8, size[0] // 4, size[1] // 4)
    assert model.decode(latents).shape == (2, 3, *size)


def test_defaults_are_sanas_autoencoder():
    with torch.device("meta"):
        model = DcAe()
    count = sum(p.numel() for p in model.parameters())
    assert (model.channels, model.downsample) == (32, 32)
    assert 312e6 < count < 313e6  # the published f32c32 has about 312 M


def test_every_parameter_gets_a_gradient():
    model = tiny.autoencoder(tiny.DCAE)
    model.reconstruct(model.posterior(torch.randn(2, 3, 32, 32))[0]).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_depths": [1, 1]}, "encoder_depths has 2 entries"),
        ({"decoder_depths": [1, 0, 1]}, "only the first depth may be 0"),
        ({"widths": [8, 24, 16]}, "24 does not divide"),
        ({"latent": 3}, "not a multiple of latent 3"),
        ({"head_dim": 5}, "not a multiple of head_dim 5"),
        ({"attention_stages": 4}, "attention_stages is 4"),
        ({"decoder_attention_stages": -1}, "decoder_attention_stages is -1"),
        ({"batch_norm_stages": 3}, "batch_norm_stages is 3, expected 0 to 2"),
        ({"scale": 0.0}, "scale is 0.0"),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        tiny.autoencoder(tiny.DCAE, **{"encoder_depths": [1, 1, 1], "decoder_depths": [1, 1, 1], **change})
