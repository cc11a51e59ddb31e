"""Layers of a diffusion transformer. Tokens keep their grid, (B, h, w, C), so no function takes height and width.

Legend: B batch, h, w token grid, C width, L caption tokens, H heads, D head width.
"""

import math
from collections.abc import Callable
from typing import Annotated, Literal, cast, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sana_lab.config.ranges import Ratio, Width
from sana_lab.config.specs import RUNTIME, SpecError
from sana_lab.ops.cpu_linear import product
from sana_lab.ops.gelu import gelu
from sana_lab.ops.mix_ffn import mix_ffn
from sana_lab.ops.softmax_attention import softmax_attention

Scattered = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
"""(convolution of a grid, expanded tokens (B, 1, n, 2 M)) -> (B, 1, n, M): Mix-FFN's 3x3 under token routing."""


class RmsNorm(nn.Module):
    """Root-mean-square norm over the last axis, statistics in float32 or wider; `scale` initialises the weight."""

    def __init__(self, dim: int, scale: float = 1.0, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.full((dim,), scale))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight.to(wide.dtype)).to(x.dtype)


def saturated(x: Tensor) -> Tensor:
    """Clamp float16 to its finite range; other dtypes are returned unchanged.

    Output projections of the released models reach 10^6 (diffusers issue 10336), and infinity minus infinity is NaN.
    """
    return x.clamp(-65504, 65504) if x.dtype == torch.float16 else x


def hidden_width(ratio: float, dim: int) -> int:
    """Whole part of ratio x dim. SpecError below 1."""
    if int(ratio * dim) < 1:
        raise SpecError(f"ratio is {ratio}, so the hidden width of {dim} is 0; expected at least {1 / dim:.3g}")
    return int(ratio * dim)


@final
class MixFfn(nn.Module):
    """SANA's Mix-FFN (GLUMBConv): 1x1 up, SiLU, 3x3 depthwise, SiLU gate, 1x1 down.

    The zero padding of its 3x3 encodes positions, so that the DiT needs no position embedding.
    """

    def __init__(
        self,
        ratio: Ratio = 2.5,  # hidden width as a multiple of the model's
        kernel: Width = 3,  # side of the depthwise convolution; odd
        # Implementation; does not change results. auto is Triton on CUDA (3 x 3 only), torch elsewhere.
        backend: Annotated[Literal["auto", "torch", "triton"], RUNTIME] = "auto",
        *,
        dim: int,
    ) -> None:
        super().__init__()
        hidden = hidden_width(ratio, dim)
        self.expand = nn.Linear(dim, 2 * hidden)
        self.depthwise = nn.Conv2d(2 * hidden, 2 * hidden, kernel, padding=kernel // 2, groups=2 * hidden)
        self.project = nn.Linear(hidden, dim, bias=False)
        self.backend: Literal["auto", "torch", "triton"] = backend
        self.scattered: Scattered | None = None  # applies the convolution to tokens that are no whole grid

    def forward(self, x: Tensor) -> Tensor:
        y = product(self.expand, x, self.backend)
        y = self.convolve(y) if self.scattered is None else self.scattered(self.convolve, y)
        return product(self.project, y, self.backend)

    def convolve(self, y: Tensor) -> Tensor:
        """Gated 3x3 of expanded tokens (B, h, w, 2 M) -> (B, h, w, M); zeros are as the padding outside of the grid."""
        convolution = self.depthwise.weight, cast(Tensor, self.depthwise.bias)
        return mix_ffn(y, *convolution, backend=self.backend, overwrite=True)


@final
class Mlp(nn.Module):
    """Standard feed-forward layer of a DiT: Linear, GELU (tanh), Linear."""

    def __init__(
        self,
        ratio: Ratio = 4.0,  # hidden width as a multiple of the model's
        *,
        dim: int,
    ) -> None:
        super().__init__()
        hidden = hidden_width(ratio, dim)
        self.expand = nn.Linear(dim, hidden)
        self.project = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(gelu(self.expand(x)))


class CrossAttention(nn.Module):
    """Softmax attention of image tokens to caption tokens; projections with bias, optional RMSNorm of q and k."""

    def __init__(self, dim: int, heads: int, norm: bool = False, eps: float = 1e-6) -> None:
        super().__init__()
        if dim % heads:
            raise SpecError(f"width {dim} is not a multiple of the number of cross-attention heads {heads}")
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm_q = RmsNorm(dim, eps=eps) if norm else nn.Identity()
        self.norm_k = RmsNorm(dim, eps=eps) if norm else nn.Identity()

    def keys_values(self, caption: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, C) -> keys and values (B, H, L, D)."""
        k, v = self.kv(caption).chunk(2, -1)
        return self._split(self.norm_k(k)), self._split(v)

    def forward(
        self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, constant: Tensor | None = None
    ) -> Tensor:
        """x (B, h, w, C), k and v (B, H, L, D), mask (B, L) or None if all tokens are valid -> (B, h, w, C).

        With `constant` (B', C), k and v belong to the first B - B' rows of x; the other rows get the constant.
        """
        attending = x if constant is None else x[: len(k)]
        q = self._split(self.norm_q(self.q(attending.flatten(1, 2))))
        out = softmax_attention(q, k, v, None if mask is None else mask[:, None, None])
        out = self.proj(out.transpose(1, 2).flatten(2)).view_as(attending)
        return out if constant is None else torch.cat([out, constant[:, None, None].expand_as(x[len(k) :])])

    def constant(self, v: Tensor) -> Tensor:
        """Output (B, C), the same for every query, of one-token values (B, H, 1, D): softmax over one key is 1."""
        return self.proj(v.flatten(1))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class PatchEmbed(nn.Module):
    """Latents (B, channels, h p, w p) -> contiguous tokens (B, h, w, C)."""

    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).permute(0, 2, 3, 1).contiguous()


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of the module's first parameter."""
    return next(module.parameters()).dtype


def unpatch(x: Tensor, patch: int) -> Tensor:
    """Tokens (B, h, w, p p c) -> latents (B, c, h p, w p)."""
    b, h, w, _ = x.shape
    x = x.reshape(b, h, w, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(b, -1, h * patch, w * patch)


def sinusoid(t: Tensor, dim: int, period: float = 1e4, smoothing: float = 0.0) -> Tensor:
    """[cos, sin] features (B, dim) of positions or times (B,), in float32 or wider.

    With `smoothing` each is convolved over t with a Gaussian of that standard deviation, which multiplies the features
    of frequency w by exp(-(w smoothing)^2 / 2).
    """
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    rates = torch.exp(-math.log(period) * torch.arange(dim // 2, device=t.device, dtype=t.dtype) / (dim // 2))
    angles = t[:, None] * rates
    features = torch.cat([angles.cos(), angles.sin()], -1)
    return features if not smoothing else features * torch.exp(-((rates * smoothing) ** 2) / 2).repeat(2)


class TimeEmbed(nn.Module):
    """Times (B,) in [0, 1] -> (B, C): an MLP of the sinusoid of `scale` t, 1000 t in the released models.

    `smoothing` is that of the sinusoid, as a difference of times.
    """

    def __init__(self, dim: int, features: int = 256, scale: float = 1000.0, smoothing: float = 0.0) -> None:
        super().__init__()
        self.features, self.scale, self.smoothing = features, scale, smoothing
        self.mlp = nn.Sequential(nn.Linear(features, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        features = sinusoid(t * self.scale, self.features, smoothing=self.smoothing * self.scale)
        return self.mlp(features.to(dtype_of(self)))


class CaptionEmbed(nn.Module):
    """Text features (B, L, D) -> (B, L, C): an MLP, then RMSNorm with a small initial weight.

    The variance of a decoder-only LLM's features is orders of magnitude larger than T5's; the norm and its small scale
    stabilise training (SANA, section 2.3).
    """

    def __init__(self, text_dim: int, dim: int, scale: float = 0.01) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.norm = RmsNorm(dim, scale)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(self.mlp(tokens.to(dtype_of(self))))


def sincos_positions(h: int, w: int, dim: int, base: int, interpolation: float, device: torch.device) -> Tensor:
    """2-D sine-cosine position embedding (h, w, C), w first, scaled so that `base` tokens span the trained range.

    Computed in float64: float32 loses more than one digit at angles of a hundred radians.
    """
    ys = torch.arange(h, device=device, dtype=torch.float64) / (h / base) / interpolation
    xs = torch.arange(w, device=device, dtype=torch.float64) / (w / base) / interpolation
    sines = [sinusoid(axis, dim // 2).roll(dim // 4, -1) for axis in (xs, ys)]  # the paper's order is [sin, cos]
    across, down = sines[0][None].expand(h, -1, -1), sines[1][:, None].expand(-1, w, -1)
    return torch.cat([across, down], -1).float()


class Downsample(nn.Module):
    """Two 3 x 3 convolutions of an image (B, C, H, W), the first of stride 2, each with a norm per position."""

    def __init__(self, inside: int, out: int) -> None:
        super().__init__()
        self.down, self.same = nn.Conv2d(inside, out, 3, 2, 1), nn.Conv2d(out, out, 3, 1, 1)
        self.norms = nn.ModuleList([nn.RMSNorm(out), nn.RMSNorm(out)])

    def forward(self, x: Tensor) -> Tensor:
        for convolve, norm in zip((self.down, self.same), self.norms, strict=True):
            x = F.silu(norm(convolve(x).movedim(1, -1)).movedim(-1, 1))
        return x
