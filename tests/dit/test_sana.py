"""Every DiT of the table keeps one contract; Sana is diffusers' SanaTransformer2DModel, number for number."""

import pytest
import torch
from torch import Tensor, nn

from sana_lab import parts
from sana_lab.dit import Dit
from sana_lab.layers import MixFfn
from sana_lab.parts import SpecError, build
from sana_lab.types import Text

NAMES = sorted(parts.TABLE["dit"])
TINY = {"dim": 32, "depth": 2, "cross_heads": 2, "attention": {"name": "linear", "head_dim": 8}}


def make(name: str = "sana", **options: object) -> Dit:
    torch.manual_seed(0)
    return build("dit", {"name": name, **TINY, **options}, channels=4, text_dim=12)


def prompt(batch: int = 2, length: int = 5, real: int = 3) -> Text:
    """`real` tokens that count in the first row, one more in each row below."""
    random = torch.Generator().manual_seed(1)
    counts = torch.arange(batch)[:, None] + real
    return Text(torch.randn(batch, length, 12, generator=random), torch.arange(length) < counts)


def noisy(batch: int = 2, h: int = 8, w: int = 4) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(2)
    return torch.randn(batch, 4, h, w, generator=random), torch.linspace(0.1, 0.9, batch)


# --- the contract


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("patch", [1, 2, 4])
@pytest.mark.parametrize("attention", ["linear", "softmax"])
@pytest.mark.parametrize("ffn", ["mix", "mlp"])
def test_velocity_has_the_shape_of_the_latents(name: str, patch: int, attention: str, ffn: str):
    dit = make(name, patch=patch, attention=attention, ffn=ffn)
    x, t = noisy()
    assert dit(x, t, prompt()).shape == x.shape
    assert (dit.patch, dit.channels) == (patch, 4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("patch", [1, 2])
def test_gradient_reaches_every_parameter(name: str, patch: int):
    dit, (x, t) = make(name, patch=patch), noisy()
    dit(x, t, prompt()).square().sum().backward()
    idle = [k for k, p in dit.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert idle == []


@pytest.mark.parametrize("name", NAMES)
def test_prepared_text_is_the_text(name: str):
    dit, (x, t) = make(name), noisy()
    assert torch.equal(dit(x, t, dit.prepare(prompt())), dit(x, t, prompt()))


@pytest.mark.parametrize("name", NAMES)
def test_padding_has_no_effect(name: str):
    """Neither what masked tokens hold, nor how many there are; an infinity there would show."""
    dit, (x, t) = make(name), noisy()
    text = prompt()
    other = text.tokens.masked_fill(~text.mask[..., None], 1e4)
    longer = Text(torch.cat([other, torch.ones(2, 7, 12)], 1), torch.cat([text.mask, torch.zeros(2, 7, dtype=bool)], 1))
    assert torch.equal(dit(x, t, Text(other, text.mask)), dit(x, t, text))
    assert torch.allclose(dit(x, t, longer), dit(x, t, text), atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_real_tokens_time_and_latents_have_an_effect(name: str):
    dit, (x, t) = make(name), noisy()
    out, text = dit(x, t, prompt()), prompt()
    for other in (
        dit(x, t, Text(text.tokens + text.mask[..., None], text.mask)),
        dit(x, t + 0.05, text),
        dit(x + 0.05, t, text),
    ):
        assert not torch.allclose(other, out, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_images_of_a_batch_do_not_meet(name: str):
    dit, (x, t), text = make(name).double(), noisy(3), prompt(3)
    alone = dit(x[1:2].double(), t[1:2], Text(text.tokens[1:2], text.mask[1:2]))
    assert torch.allclose(dit(x.double(), t, text)[1:2], alone)


@pytest.mark.parametrize("name", NAMES)
def test_latents_must_divide_into_patches(name: str):
    dit = make(name, patch=2)
    with pytest.raises(ValueError, match="latents of 7x4 do not divide into patches of 2"):
        dit(torch.randn(1, 4, 7, 4), torch.ones(1), prompt(1))


@pytest.mark.parametrize("name", NAMES)
def test_builds_and_runs_on_the_meta_device(name: str):
    with torch.device("meta"):
        dit = make(name)
        text = Text(torch.empty(1, 5, 12), torch.ones(1, 5, dtype=torch.bool))
        assert dit(torch.empty(1, 4, 8, 8), torch.ones(1), text).shape == (1, 4, 8, 8)


# --- options of Sana


def test_mixing_and_checkpointing_share_every_key():
    softmax = make(attention={"name": "softmax", "head_dim": 8})
    linear = make(checkpointing=True)
    shapes = {k: v.shape for k, v in softmax.state_dict().items()}
    assert shapes == {k: v.shape for k, v in linear.state_dict().items()}
    linear.load_state_dict(softmax.state_dict())
    x, t = noisy()
    assert not torch.allclose(linear(x, t, prompt()), softmax(x, t, prompt()), atol=1e-4)


def test_swapping_the_mixing_leaves_the_initial_weights():
    """The same seed gives the same weights, so that two rows of a table begin equal."""
    softmax, linear = make(attention={"name": "softmax", "head_dim": 8}).state_dict(), make().state_dict()
    assert all(torch.equal(softmax[k], v) for k, v in linear.items())


def test_checkpointing_changes_no_gradient():
    x, t = noisy()
    gradients = []
    for checkpointing in (False, True):
        dit = make(checkpointing=checkpointing)
        dit(x, t, prompt()).square().sum().backward()
        gradients.append([p.grad for p in dit.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@torch.no_grad()
def test_initialisation_is_the_papers_codes():
    """Xavier, N(0, 0.02) for time and caption, PyTorch's own in Mix-FFN, zero biases, and no gate at zero."""
    dit = make(dim=256, depth=1, cross_heads=4)
    block = dit.blocks[0]
    for linear in (block.attention.qkv, block.attention.proj, block.cross.q, block.cross.kv, dit.head.linear):
        fan = sum(linear.weight.shape)
        assert linear.weight.abs().max() <= (6 / fan) ** 0.5
        assert linear.weight.std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.05)
        assert linear.bias is None or not linear.bias.any()
    for linear in (dit.time_embed.mlp[0], dit.time_embed.mlp[2], dit.time_block[1], dit.caption_embed.mlp[2]):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert isinstance(block.ffn, MixFfn)
    assert block.ffn.expand.weight.abs().max() <= 256**-0.5
    assert block.ffn.expand.weight.std().item() == pytest.approx((3 * 256) ** -0.5, rel=0.05)
    assert block.ffn.expand.bias.any()
    assert block.table.std().item() == pytest.approx(1 / 16, rel=0.1)
    assert torch.equal(dit.caption_embed.norm.weight, torch.full((256,), 0.01))


def test_cross_attention_needs_whole_heads():
    with pytest.raises(SpecError, match="cross-attention heads 5"):
        make(cross_heads=5)


def test_positions_break_the_symmetry_of_a_plain_transformer():
    """Without Mix-FFN and positions, shuffled tokens give shuffled velocities; with positions they do not."""
    x, t = noisy(1, 4, 4)
    order = torch.tensor([2, 0, 3, 1])
    for position, same in (("none", True), ("sincos", False)):
        dit = make(ffn="mlp", position=position, base=4).double()
        out = dit(x.double(), t, prompt(1))
        assert torch.allclose(dit(x.double()[:, :, order], t, prompt(1)), out[:, :, order]) is same


# --- the released sizes


@pytest.mark.parametrize(
    ("dim", "depth", "cross_heads", "millions"),
    [(1152, 28, 16, 591.75), (2240, 20, 20, 1604.46)],
    ids=["0.6B", "1.6B"],
)
def test_released_sizes_to_ten_thousand_parameters(dim: int, depth: int, cross_heads: int, millions: float):
    """All trainable parameters of SANA-1.0 as the paper's Table 6 rounds them (590M and 1604M).

    Without the caption's null embedding of 300 x 2304 numbers: a buffer in the released code, no parameter, and ours
    is the text encoder's answer to an empty prompt.
    """
    with torch.device("meta"):
        sizes = {"dim": dim, "depth": depth, "cross_heads": cross_heads}
        dit = build("dit", {"name": "sana", **sizes}, channels=32, text_dim=2304)
    count = sum(p.numel() for p in dit.parameters() if p.requires_grad)
    assert count / 1e6 == pytest.approx(millions, abs=0.01)
    softmax = build_meta({"name": "sana", **sizes, "attention": "softmax"})
    assert sum(p.numel() for p in softmax.parameters()) == count


def build_meta(spec: parts.Spec) -> nn.Module:
    with torch.device("meta"):
        return build("dit", spec, channels=32, text_dim=2304)


# --- diffusers


def to_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our keys under the names of diffusers' SanaTransformer2DModel."""
    simple = {
        "patch_embed.proj.": "patch_embed.proj.",
        "time_embed.mlp.0.": "time_embed.emb.timestep_embedder.linear_1.",
        "time_embed.mlp.2.": "time_embed.emb.timestep_embedder.linear_2.",
        "time_block.1.": "time_embed.linear.",
        "caption_embed.mlp.0.": "caption_projection.linear_1.",
        "caption_embed.mlp.2.": "caption_projection.linear_2.",
        "caption_embed.norm.": "caption_norm.",
        "head.linear.": "proj_out.",
        "head.table": "scale_shift_table",
        "blocks.": "transformer_blocks.",
    }
    inner = {
        ".table": ".scale_shift_table",
        ".attention.proj.": ".attn1.to_out.0.",
        ".attention.norm_q.": ".attn1.norm_q.",
        ".attention.norm_k.": ".attn1.norm_k.",
        ".cross.q.": ".attn2.to_q.",
        ".cross.proj.": ".attn2.to_out.0.",
        ".cross.norm_q.": ".attn2.norm_q.",
        ".cross.norm_k.": ".attn2.norm_k.",
        ".ffn.expand.": ".ff.conv_inverted.",
        ".ffn.depthwise.": ".ff.conv_depth.",
        ".ffn.project.": ".ff.conv_point.",
    }
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        name = next(new + key.removeprefix(old) for old, new in simple.items() if key.startswith(old))
        if ".qkv." in name:
            for part, chunk in zip("qkv", value.chunk(3), strict=True):
                out[name.replace(".attention.qkv.", f".attn1.to_{part}.")] = chunk
        elif ".kv." in name:
            for part, chunk in zip("kv", value.chunk(2), strict=True):
                out[name.replace(".cross.kv.", f".attn2.to_{part}.")] = chunk
        else:
            for old, new in inner.items():
                name = name.replace(old, new)
            point = name.endswith(("conv_inverted.weight", "conv_point.weight"))
            out[name] = value[..., None, None] if point else value
    return out


def peer(dit: Dit, patch: int, norms: bool, interpolation: float | None) -> nn.Module:
    from diffusers import SanaTransformer2DModel

    model = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=12,
        sample_size=4 * patch, patch_size=patch, interpolation_scale=interpolation,
        qk_norm="rms_norm_across_heads" if norms else None,
    )  # fmt: skip
    model.load_state_dict(to_diffusers(dit.state_dict()))
    for block in model.transformer_blocks if norms else []:
        block.attn2.norm_q.eps = block.attn2.norm_k.eps = 1e-6  # as in the released code; diffusers has 1e-5
    return model.eval()


@pytest.mark.parametrize(
    ("patch", "norms", "interpolation"),
    [(1, False, None), (2, False, None), (4, False, None), (1, True, None), (1, False, 1.0), (2, True, 2.0)],
)
@torch.no_grad()
def test_numbers_are_diffusers(patch: int, norms: bool, interpolation: float | None):
    """Every weight drawn afresh, so that no bias or norm hides; its network reads 1000 t. float32, error <= 1e-5."""
    dit = make(
        patch=patch,
        attention={"name": "linear", "head_dim": 8, "qk_norm": norms},
        cross_norm=norms,
        position="none" if interpolation is None else "sincos",
        base=4,
        interpolation=interpolation or 1.0,
    ).eval()
    for p in dit.parameters():
        nn.init.normal_(p, mean=0.05, std=0.15)
    x, t = noisy(2, 8 * patch, 4 * patch)
    text = prompt()
    ours = dit(x, t, text)
    theirs = peer(dit, patch, norms, interpolation)(
        x, encoder_hidden_states=text.tokens, encoder_attention_mask=text.mask.long(), timestep=1000 * t
    ).sample
    assert theirs.norm() > 0.1 * x.norm()
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
