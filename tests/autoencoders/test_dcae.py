"""DC-AE against diffusers' AutoencoderDC, naive attention, and its own promises."""

import re

import pytest
import torch
from torch import Tensor, nn

from sana_lab.autoencoders.dcae import DcAe, average_channels, relu_attention, repeat_channels

TINY = {"widths": (8, 16, 16), "attention_stages": 1, "latent": 8, "head_dim": 8}


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


def ours_from(theirs: dict[str, Tensor], model: DcAe, depths: list[int]) -> dict[str, Tensor]:
    out = {}
    for key, value in model.state_dict().items():
        if key in ("shift", "scale"):
            out[key] = value
            continue
        name = renamed(shifted(key, depths))
        if ".attention.qkv." in key:
            found = torch.cat([theirs[name.replace(".attention.qkv.", f".attn.to_{x}.")] for x in "qkv"])
        else:
            found = theirs[name]
        out[key] = found.reshape(value.shape)
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
        encoder_block_out_channels=TINY["widths"],
        decoder_block_out_channels=TINY["widths"],
        encoder_layers_per_block=tuple(encoder),
        decoder_layers_per_block=tuple(decoder),
        encoder_qkv_multiscales=multiscales,
        decoder_qkv_multiscales=multiscales,
        downsample_block_type="Conv" if down == "conv" else "pixel_unshuffle",
        upsample_block_type="interpolate" if up == "interpolate" else "pixel_shuffle",
    ).eval()
    scatter(theirs)
    model = DcAe(**TINY, encoder_depths=encoder, decoder_depths=decoder, multiscales=scales, down=down, up=up)
    state = ours_from(theirs.state_dict(), model, encoder)
    model.load_state_dict(state)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in theirs.parameters())
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        z = theirs.encode(images).latent
        torch.testing.assert_close(model.posterior(images)[0], z, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.reconstruct(z), theirs.decode(z).sample, rtol=1e-4, atol=1e-5)


def scatter(model: nn.Module) -> None:
    """Norm weights and biases away from one and zero, so that a missing one shows."""
    for name, p in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(p, 0.5, 0.3)


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
    model = DcAe(**TINY, encoder_depths=[0, 1, 1], decoder_depths=[0, 1, 1])
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
    model = DcAe(**TINY, encoder_depths=[0, 1, 1], decoder_depths=[0, 1, 1])
    model.reconstruct(model.posterior(torch.randn(2, 3, 32, 32))[0]).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_depths": [1, 1]}, "encoder_depths has 2 entries and widths 3"),
        ({"decoder_depths": [1, 0, 1]}, "only the first depth may be 0"),
        ({"widths": (8, 24, 16)}, "24 does not divide"),
        ({"latent": 3}, "not a multiple of latent 3"),
        ({"head_dim": 5}, "not a multiple of head_dim 5"),
        ({"attention_stages": 4}, "attention_stages is 4"),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DcAe(**{**TINY, "encoder_depths": [1, 1, 1], "decoder_depths": [1, 1, 1], **change})
