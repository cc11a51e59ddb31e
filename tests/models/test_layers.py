"""Layers against their formulas, written out here by loops or other libraries."""

import math

import pytest
import torch
from torch import Tensor, nn

from sana_lab.config.specs import SpecError, build
from sana_lab.models.layers import (
    CaptionEmbed,
    CrossAttention,
    MixFfn,
    Mlp,
    PatchEmbed,
    RmsNorm,
    TimeEmbed,
    sincos_positions,
    sinusoid,
    unpatch,
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return a.shape == b.shape and ((a - b).norm() <= tolerance * b.norm()).item()


# --- norms


def test_rms_norm_is_torchs():
    norm, peer = RmsNorm(12, 0.5), nn.RMSNorm(12, eps=1e-5)
    nn.init.constant_(peer.weight, 0.5)
    x = torch.randn(3, 4, 12) * torch.logspace(-4, 4, 3)[:, None, None]
    assert close(norm(x), peer(x))


def test_rms_norm_counts_in_float32():
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    norm = RmsNorm(64).bfloat16()
    wide = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert norm(x).dtype == torch.bfloat16
    assert (norm(x).double() - wide).abs().max() <= wide.abs().max() * 2**-8
    big = torch.full((1, 64), 300.0, dtype=torch.float16)  # its square does not fit float16
    assert torch.allclose(RmsNorm(64).half()(big).float(), torch.ones(1, 64), atol=1e-3)


# --- feed-forward


def test_mix_ffn_is_the_convolutions_of_the_paper():
    ffn = MixFfn(2.5, dim=8)
    x = torch.randn(2, 5, 3, 8)
    up, gate_and_value = nn.Conv2d(8, 40, 1), nn.Conv2d(40, 40, 3, padding=1, groups=40)
    down = nn.Conv2d(20, 8, 1, bias=False)
    up.load_state_dict({"weight": ffn.expand.weight[..., None, None], "bias": ffn.expand.bias})
    gate_and_value.load_state_dict(ffn.depthwise.state_dict())
    down.load_state_dict({"weight": ffn.project.weight[..., None, None]})
    silu = lambda y: y * torch.sigmoid(y)  # noqa: E731
    value, gate = gate_and_value(silu(up(x.permute(0, 3, 1, 2)))).chunk(2, 1)
    assert close(ffn(x), down(value * silu(gate)).permute(0, 2, 3, 1))


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 2), (2, 1), (3, 1), (4, 4), (7, 3)])
def test_mix_ffn_on_every_grid_size(grid: tuple[int, int]):
    """Small grids may take another road to the same numbers."""
    ffn, x = MixFfn(1.5, dim=6).double(), torch.randn(3, *grid, 6, dtype=torch.float64, requires_grad=True)
    inner = nn.functional.silu(ffn.expand(x))
    out = torch.zeros(3, *grid, 18, dtype=torch.float64) + ffn.depthwise.bias
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            moved = nn.functional.pad(inner, (0, 0, 1, 1, 1, 1))[:, 1 + dy :, 1 + dx :][:, : grid[0], : grid[1]]
            out = out + moved * ffn.depthwise.weight[:, 0, 1 + dy, 1 + dx]
    value, gate = out.chunk(2, -1)
    expected = ffn.project(value * nn.functional.silu(gate))
    assert close(ffn(x), expected, 1e-12)
    weights = [x, *ffn.parameters()]
    for a, b in zip(
        torch.autograd.grad(ffn(x).sum(), weights), torch.autograd.grad(expected.sum(), weights), strict=True
    ):
        assert close(a, b, 1e-10)


def test_mix_ffn_of_another_kernel_size_is_for_torch():
    ffn, x = MixFfn(kernel=5, dim=8, backend="triton"), torch.randn(1, 4, 4, 8)
    with pytest.raises(ValueError, match="'triton' needs a depthwise kernel of 3 x 3, not 5 x 5; backend 'torch'"):
        ffn(x)
    ffn.backend = "auto"
    assert ffn(x).shape == x.shape


def test_mix_ffn_without_gradients_is_the_same_to_the_last_bit():
    """It saves memory then, of its own: what it was given stays as it was."""
    for grid in [(1, 2), (2, 2), (5, 4)]:
        ffn, x = MixFfn(dim=16), torch.randn(2, *grid, 16)
        before, expected = x.clone(), ffn(x)
        with torch.no_grad():
            assert torch.equal(ffn(x), expected)
        assert torch.equal(x, before)


def test_mix_ffn_knows_where_a_token_is_and_mlp_does_not():
    x = torch.randn(8).expand(1, 4, 4, 8)
    mixed, plain = MixFfn(dim=8)(x), Mlp(dim=8)(x)
    assert (mixed[0, 0, 0] - mixed[0, 1, 1]).abs().max() > 1e-4  # corner and middle differ by the zero padding
    assert torch.allclose(plain, plain[:, :1, :1].expand_as(plain))


def test_mlp_is_its_formula():
    mlp, x = Mlp(2.0, dim=6).double(), torch.randn(1, 2, 2, 6, dtype=torch.float64)
    y = x @ mlp.expand.weight.T + mlp.expand.bias
    gelu = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
    assert mlp.expand.out_features == 12
    assert close(mlp(x), gelu @ mlp.project.weight.T + mlp.project.bias, 1e-12)


# --- cross-attention


@pytest.mark.parametrize("norm", [False, True])
def test_cross_attention_is_a_naive_loop(norm: bool):
    cross = CrossAttention(12, 3, norm).double()
    x, caption = torch.randn(2, 2, 3, 12, dtype=torch.float64), torch.randn(2, 5, 12, dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False, False], [True, True, True, True, True]])
    out = cross(x, *cross.keys_values(caption), mask)
    rms = lambda y: y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() if norm else y  # noqa: E731
    q, (k, v) = rms(cross.q(x)), cross.kv(caption).chunk(2, -1)
    k = rms(k)
    for b in range(2):
        for i in range(2):
            for j in range(3):
                heads = []
                for h in range(3):
                    part, real = slice(4 * h, 4 * h + 4), mask[b]
                    weights = torch.softmax(k[b, real, part] @ q[b, i, j, part] / 2.0, 0)
                    heads.append(weights @ v[b, real, part])
                assert close(out[b, i, j], cross.proj(torch.cat(heads)), 1e-12)


def test_cross_attention_needs_whole_heads():
    with pytest.raises(SpecError, match=r"width 30 is not a multiple .* cross-attention heads 4"):
        CrossAttention(30, 4)


# --- embeddings


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_patches_are_cut_and_put_back(patch: int):
    """With an orthogonal projection, cutting and putting back gives the picture."""
    size = 3 * patch * patch
    embed = PatchEmbed(3, size, patch).double()
    nn.init.zeros_(embed.proj.bias)
    nn.init.orthogonal_(embed.proj.weight.data.view(size, size))
    x = torch.randn(2, 3, 4 * patch, 2 * patch, dtype=torch.float64)
    tokens = embed(x) @ embed.proj.weight.view(size, size)  # (c p p) order, as the convolution reads
    tokens = tokens.unflatten(-1, (3, patch, patch)).permute(0, 1, 2, 4, 5, 3).flatten(3)  # (p p c)
    assert tokens.shape == (2, 4, 2, size)
    assert torch.allclose(unpatch(tokens, patch), x)


def test_sinusoid_is_its_formula():
    t = torch.tensor([0.0, 0.5, 999.0])
    out = sinusoid(t, 8)
    for row, value in zip(out.tolist(), t.tolist(), strict=True):
        angles = [value / 10000 ** (i / 4) for i in range(4)]
        assert row == pytest.approx([*map(math.cos, angles), *map(math.sin, angles)], abs=1e-4)


def test_time_embedding_reads_thousandths():
    embed, t = TimeEmbed(16), torch.tensor([0.0, 0.25, 1.0])
    assert close(embed(t), embed.mlp(sinusoid(torch.tensor([0.0, 250.0, 1000.0]), 256)))


def test_caption_embedding_is_normed_whatever_comes_in():
    embed = CaptionEmbed(6, 32, 0.01)
    for scale in (1.0, 1e4):
        rms = embed(scale * torch.randn(2, 3, 6)).square().mean(-1).sqrt()
        assert torch.allclose(rms, torch.full_like(rms, 0.01), rtol=0.02)


@pytest.mark.parametrize(("grid", "interpolation"), [((4, 4), 1.0), ((6, 3), 2.0)])
def test_positions_are_diffusers(grid: tuple[int, int], interpolation: float):
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    expected = get_2d_sincos_pos_embed(24, grid, interpolation_scale=interpolation, base_size=4, output_type="pt")
    ours = sincos_positions(*grid, 24, 4, interpolation, torch.device("cpu"))
    assert torch.allclose(ours.flatten(0, 1), expected.float(), atol=1e-5)


@pytest.mark.parametrize("name", ["mix", "mlp"])
def test_a_ratio_that_leaves_no_hidden_width_is_refused(name: str) -> None:
    with pytest.raises(SpecError, match=r"ratio is 0\.01, so the hidden width of 24 is 0; expected at least 0\.0417"):
        build("ffn", {"name": name, "ratio": 0.01}, dim=24)
