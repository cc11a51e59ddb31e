"""Every DiT of the table keeps one contract; Sana is diffusers' SanaTransformer2DModel, number for number."""

import pytest
import tiny
import torch
from torch import Tensor, nn

from sana_lab.checkpoints import architectures, key_tables, rename_keys
from sana_lab.config import registry, specs
from sana_lab.config.specs import SpecError, build
from sana_lab.costs.live_memory import LiveBytes
from sana_lab.models.dit import Dit
from sana_lab.models.layers import MixFfn, saturated
from sana_lab.types import Text

NAMES = sorted(registry.TABLE["dit"])


def make(name: str = "sana", **options: object) -> Dit:
    return tiny.dit(name=name, **options).train()


def prompt(batch: int = 2, length: int = 5, real: int = 3) -> Text:
    """`real` tokens that count in the first row, one more in each row below."""
    return tiny.caption(range(real, real + batch), 1, length, torch.float32)


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
    assert torch.equal(dit.prepare(prompt())(x, t), dit(x, t, prompt()))


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
    for checkpointing in (False, "selective", True):
        dit = make(checkpointing=checkpointing)
        dit(x, t, prompt()).square().sum().backward()
        gradients.append([p.grad for p in dit.parameters()])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*gradients, strict=True))


@pytest.mark.parametrize("attention", ["linear", "softmax"])
def test_checkpointing_keeps_less(attention):
    """Bytes that live between forward and backward: all, the results of products and attention, the blocks' inputs."""
    x, t = noisy(2, 16, 16)
    kept = {}
    for checkpointing in (False, "selective", True):
        dit = make(checkpointing=checkpointing, attention=attention)
        with LiveBytes(dit.parameters()) as mode:
            loss = dit(x, t, prompt()).square().sum()
            kept[checkpointing] = mode.live
            loss.backward()
    grid = 2 * 16 * 16 * tiny.DIT["dim"] * 4  # bytes of a block's tokens
    assert kept[False] - kept["selective"] > 2 * 15 * grid  # in two blocks; of Mix-FFN alone 5 + 5 + 2.5 + 2.5
    assert kept["selective"] - kept[True] > 2 * 8 * grid  # 3 of qkv, 5 of Mix-FFN and more
    assert kept[True] < 12 * grid


def test_checkpointing_has_three_names():
    with pytest.raises(SpecError, match=r"checkpointing is 'selektive' .*selective"):
        make(checkpointing="selektive")


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


def build_meta(spec: specs.Spec) -> nn.Module:
    with torch.device("meta"):
        return build("dit", spec, channels=32, text_dim=2304)


# --- options of SANA-Sprint


def test_guidance_has_an_effect_and_is_asked_for():
    distilled, plain, (x, t) = make(guidance=0.1), make(), noisy()
    low, high = (distilled(x, t, prompt(), torch.full((2,), scale)) for scale in (1.0, 4.5))
    assert not torch.allclose(low, high, atol=1e-5)
    with pytest.raises(ValueError, match=r"distilled with guidance; expected guidance \(B,\)"):
        distilled(x, t, prompt())
    with pytest.raises(ValueError, match="was not distilled with it; expected none"):
        plain(x, t, prompt(), torch.ones(2))


def test_later_options_leave_the_hash():
    old = set(specs.canonical("dit", "sana"))
    assert not {"time_scale", "guidance", "cross_norm_eps"} & old
    assert "guidance" in specs.canonical("dit", {"name": "sana", "guidance": 0.1})


# --- diffusers

SMALL = {  # two heads of 32: narrower ones are at times all but dead, and then no float32 gradient is right to 1e-5
    "num_attention_heads": 2, "num_layers": 2, "num_cross_attention_heads": 2, "cross_attention_head_dim": 32,
    "cross_attention_dim": 64, "caption_channels": 12, "in_channels": 4, "out_channels": 4, "sample_size": 8,
}  # fmt: skip
W1152 = {  # a block of SANA-0.6B
    "num_attention_heads": 36, "num_layers": 1, "num_cross_attention_heads": 16, "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152, "caption_channels": 2304,
}  # fmt: skip
W2240 = {"num_layers": 1}  # a block of SANA-1.6B: diffusers' own defaults
NORMS = {"qk_norm": "rms_norm_across_heads"}
SPRINT = {**NORMS, "guidance_embeds": True}
CASES: dict[str, tuple[dict[str, object], tuple[int, int]]] = {  # configuration, latents' size
    "0.6B block": (W1152, (6, 10)),
    "1.6B block": (W2240, (4, 6)),
    "1.5 1.6B block": ({**W2240, **NORMS}, (4, 6)),
    "Sprint 0.6B block": ({**W1152, **SPRINT}, (6, 4)),
    "F8C4P2 0.6B block": ({**W1152, "in_channels": 4, "out_channels": 4, "patch_size": 2}, (12, 20)),
    "2K position, trained size": ({**SMALL, "sample_size": 64, "interpolation_scale": 1.0}, (64, 64)),
    "2K position, wide": ({**SMALL, "sample_size": 64, "interpolation_scale": 1.0}, (24, 100)),
    "4K position, high": ({**SMALL, "sample_size": 128, "interpolation_scale": 2.0}, (130, 20)),
    "4K position, patch 2": ({**SMALL, "sample_size": 128, "interpolation_scale": 2.0, "patch_size": 2}, (32, 44)),
    "1.5, patch 2": ({**SMALL, **NORMS, "patch_size": 2}, (6, 14)),
    "Sprint, patch 2": ({**SMALL, **SPRINT, "patch_size": 2}, (14, 6)),
    "Sprint's teacher": ({**SMALL, **NORMS, "timestep_scale": 0.001}, (5, 7)),
}


HEAVY = {"1.6B block"}  # without norms as 0.6B is, and of the width of 1.5 1.6B


def peer(config: dict[str, object]) -> nn.Module:
    """Every weight drawn, so that no bias or norm hides; matrices keep their input's size."""
    from diffusers import SanaTransformer2DModel

    model, random = SanaTransformer2DModel(**config).eval(), torch.Generator().manual_seed(0)
    for p in model.parameters():
        wide = p.ndim > 1 and len(p) > 6
        torch.randn(p.shape, generator=random, out=p.data).mul_(p[0].numel() ** -0.5 if wide else 0.3)
        p.data += 0.0 if wide else 0.2
    return model


def ours_of(model: nn.Module) -> Dit:
    spec, supplied = architectures.read_sana(dict(model.config))
    with torch.device("meta"):
        dit = build("dit", spec, **supplied)
    dit.load_state_dict(ours(dit, dict(model.named_parameters())), assign=True)
    return dit.eval()


def ours(dit: Dit, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors, or gradients, by our names."""
    results = rename_keys.to_ours(dit.state_dict(), theirs, key_tables.sana_diffusers(dit.spec), "diffusers")
    return {k: v.detach().clone() for k, v in results.items()}


def answers(model: nn.Module, dit: Dit, size: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
    """(latents' gradient, velocity) by diffusers and by us; captions of 1, 5 and 12 tokens, times that are no integers.

    A SanaPipeline gives its network 1000 t times the configured scale; Sprint's gives it t and 0.1 times guidance.
    """
    random, config = torch.Generator().manual_seed(1), model.config
    x = torch.randn(3, config.in_channels, *size, generator=random)
    tokens = torch.randn(3, 12, config.caption_channels, generator=random)
    mask = torch.arange(12) < torch.tensor([[1], [5], [12]])
    t, guidance = torch.tensor([0.9987, 0.5004, 0.0201]), torch.tensor([4.5, 1.0, 7.0]) if dit.guidance_embed else None
    pull = torch.randn(x.shape, generator=random)
    results = []
    for side in ("theirs", "ours"):
        latents = x.clone().requires_grad_()
        if side == "ours":
            out = dit(latents, t, Text(tokens, mask), guidance)
        else:
            inputs = {"timestep": 1000 * t * config.timestep_scale} if guidance is None else {
                "timestep": t, "guidance": guidance * config.guidance_embeds_scale
            }  # fmt: skip
            out = model(latents, encoder_hidden_states=tokens, encoder_attention_mask=mask.long(), **inputs).sample
        (out * pull).sum().backward()
        results.append((latents.grad, out.detach()))
    return results


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c in HEAVY)) for c in CASES])
def test_numbers_and_gradients_are_diffusers(case: str):
    """float32, relative error of the velocity, of the latents' gradient and of every parameter's <= 1e-5."""
    config, size = CASES[case]
    model = peer(config)
    dit = ours_of(model)
    (their_pull, theirs), (our_pull, out) = answers(model, dit, size)
    assert theirs.norm() > 0.1 * theirs.numel() ** 0.5
    assert tiny.error(out, theirs) <= 1e-5
    assert tiny.error(our_pull, their_pull) <= 1e-5
    gradients = ours(dit, {k: p.grad for k, p in model.named_parameters()})
    errors = {k: tiny.error(p.grad, gradients[k]) for k, p in dit.named_parameters()}
    assert {k: e for k, e in errors.items() if e > 1e-5} == {}


def test_the_way_back_to_diffusers():
    """Our names, shapes and options become theirs again, nothing lost."""
    for config in (SMALL, {**SMALL, **NORMS, "patch_size": 2, "interpolation_scale": 2.0}, {**SMALL, **SPRINT}):
        model = peer(config)
        dit = ours_of(model)
        back = rename_keys.to_theirs(dit.state_dict(), key_tables.sana_diffusers(dit.spec))
        assert back.keys() == model.state_dict().keys()
        assert all(torch.equal(back[k], v) for k, v in model.state_dict().items())
        written = architectures.write_sana(dit.spec, {"channels": 4, "text_dim": 12})
        assert written == {k: v for k, v in model.config.items() if not k.startswith("_")}


def test_a_zero_head_begins_with_no_velocity_and_learns():
    dit = make(zero_head=True)
    text = Text(torch.randn(2, 5, 12), torch.ones(2, 5, dtype=torch.bool))
    velocity = dit(torch.randn(2, 4, 4, 4), torch.rand(2), text)
    assert not velocity.any()
    (velocity - 1).square().mean().backward()
    assert dit.head.linear.weight.grad.abs().sum() > 0
    assert make().head.linear.weight.any()


# --- float16


def hot(half: bool) -> nn.Module:
    """diffusers' network with a channel after attention that leaves float16's range, as in released ones."""
    model = peer({**SMALL, "num_layers": 1})
    with torch.no_grad():
        attention = model.transformer_blocks[0].attn1
        attention.to_v.weight *= 30
        attention.to_out[0].weight[0] *= 1e4
    return model.half() if half else model


def drawn_by(net: nn.Module, x: Tensor, t: Tensor, text: Text) -> Tensor:
    if isinstance(net, Dit):
        return net(x, t, text)
    inputs = {"encoder_hidden_states": text.tokens, "encoder_attention_mask": text.mask.long()}
    return net(x, timestep=1000 * t, **inputs).sample


@torch.no_grad()
def test_float16_is_cut_where_diffusers_cuts_it():
    """Without the cut, infinity less infinity is NaN; in other dtypes nothing is cut."""
    x, t = noisy()
    text = prompt()
    inside: list[Tensor] = []
    wide = ours_of(hot(False))
    wide.blocks[0].attention.proj.register_forward_hook(lambda m, i, o: inside.append(o))
    expected = drawn_by(hot(False), x, t, text)
    assert tiny.error(wide(x, t, text), expected) <= 1e-5
    assert inside[0].abs().max() > 1e5
    halves = x.half(), t.half(), Text(text.tokens.half(), text.mask)
    half = ours_of(hot(True))
    for part in (half.blocks[0].attention.proj, half.blocks[0].attention):
        part.register_forward_hook(lambda m, i, o: inside.append(o))
    theirs, out = drawn_by(hot(True), *halves), half(*halves)
    assert [x.abs().max().item() for x in inside[1:]] == [torch.inf, 65504]
    assert theirs.isfinite().all()
    assert tiny.error(out.float(), theirs.float()) <= 5e-3


def test_only_float16_is_cut():
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.tensor([1e6, -1e6], dtype=dtype)
        assert saturated(x) is x
    cut = saturated(torch.tensor([1e6, -1e6, 3.0]).half())
    assert cut.tolist() == [65504, -65504, 3]
