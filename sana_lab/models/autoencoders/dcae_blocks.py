"""Blocks of DC-AE: residual blocks, multi-scale linear attention, and resampling with shortcuts.

Each has a `backend` for inference and a method `tiled`. Legend: B batch, C channels, h x w grid, G heads, D head width,
N = h * w cells.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_lab.models.autoencoders.fast_inference import apply_conv3x3
from sana_lab.models.autoencoders.tiling import Tiled, reach_doubling, reach_halving, reach_pixel_shuffle, reach_same
from sana_lab.ops.backend import Backend, choose
from sana_lab.ops.conv import Norm, conv3x3, upsample_conv3x3
from sana_lab.ops.inference_backend import Fast, uses_fast
from sana_lab.ops.linear_attention import linear_attention
from sana_lab.ops.mix_ffn import mix_ffn
from sana_lab.ops.mix_ffn.reference import unsupported
from sana_lab.ops.rms_norm import rms_norm_2d

Down = Literal["conv", "unshuffle"]
Up = Literal["interpolate", "shuffle"]
Activation = Literal["relu", "silu"]

GAIN = 0.1  # initial weight of the norm that ends a residual branch, so that blocks start near the identity
EPS = 1e-15  # added to the normaliser of attention


class Downsample(nn.Module):
    """(B, C, 2h, 2w) -> (B, C', h, w): a convolution plus the space-to-channel shortcut (averaging)."""

    def __init__(self, width: int, out: int, method: Down, shortcut: bool = True, backend: Fast = "auto") -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, out, 3, 2, 1) if method == "conv" else nn.Conv2d(width, out // 4, 3, padding=1)
        self.unshuffle, self.shortcut, self.out, self.backend = method == "unshuffle", shortcut, out, backend

    def tiled(self, x: Tiled) -> Tiled:
        return x.then(self, reach_halving, down=2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.pixel_unshuffle(apply_conv3x3(self.conv, x, self.backend), 2) if self.unshuffle else self.conv(x)
        return add_averaged(x, y, self.backend) if self.shortcut else y


class Upsample(nn.Module):
    """(B, C, h, w) -> (B, C', 2h, 2w): a convolution plus the channel-to-space shortcut (duplication)."""

    def __init__(self, width: int, out: int, method: Up, shortcut: bool = True, backend: Fast = "auto") -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, out if method == "interpolate" else 4 * out, 3, padding=1)
        self.shuffle, self.shortcut, self.out, self.backend = method == "shuffle", shortcut, out, backend

    def tiled(self, x: Tiled) -> Tiled:
        return x.then(self, reach_pixel_shuffle if self.shuffle else reach_doubling, up=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.resampled(x)
        return add_duplicated(x, y, self.backend) if self.shortcut else y

    def resampled(self, x: Tensor) -> Tensor:
        if self.shuffle:
            return F.pixel_shuffle(apply_conv3x3(self.conv, x, self.backend), 2)
        return upsample_conv3x3(x, self.conv.weight, self.conv.bias, self.backend)


class ResBlock(nn.Module):
    """x + norm(conv(act(conv(x)))), (B, C, h, w) -> same; RMSNorm and SiLU, or batch norm and ReLU."""

    def __init__(self, width: int, batch_norm: bool = False, backend: Fast = "auto") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = batch_norm_2d(width) if batch_norm else RmsNorm2d(width, GAIN, backend=backend)
        self.activation: Activation = "relu" if batch_norm else "silu"
        self.backend = backend

    def tiled(self, x: Tiled) -> Tiled:
        return x.then(self, reach_same(2))

    def forward(self, x: Tensor) -> Tensor:
        y = conv3x3(x, self.conv1.weight, self.conv1.bias, activation=self.activation, backend=self.backend)
        if isinstance(self.norm, RmsNorm2d):
            return conv3x3(y, self.conv2.weight, norm=self.norm.parts(), residual=x, backend=self.backend)
        return x + self.norm(apply_conv3x3(self.conv2, y, self.backend))


class EfficientViTBlock(nn.Module):
    """Multi-scale linear attention, then a gated convolutional feed-forward; (B, C, h, w) -> same."""

    def __init__(self, width: int, head_dim: int, multiscales: Sequence[int], backend: Fast = "auto") -> None:
        super().__init__()
        self.attention = MultiscaleAttention(width, head_dim, multiscales, backend)
        self.ffn = GluMbConv(width, backend=backend)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(self.attention(x))

    def tiled(self, x: Tiled) -> Tiled:
        state = self.attention.state(x)
        x = x.then(lambda t: self.attention.query(t, state), reach_same(self.attention.radius)).materialised()
        return x.then(self.ffn, reach_same(1))


class MultiscaleAttention(nn.Module):
    """x + ReLU linear attention over the grid, (B, C, h, w) -> same (EfficientViT, arXiv 2205.14756).

    Channels of `qkv` are ordered by head, each with D of q, then k, then v.
    """

    def __init__(self, width: int, head_dim: int, multiscales: Sequence[int], backend: Fast = "auto") -> None:
        super().__init__()
        heads = width // head_dim
        inner = heads * head_dim
        self.head_dim, self.radius, self.backend = head_dim, max(multiscales, default=1) // 2, backend
        self.qkv = nn.Conv2d(width, 3 * inner, 1, bias=False)
        self.scales = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(3 * inner, 3 * inner, size, padding=size // 2, groups=3 * inner, bias=False),
                nn.Conv2d(3 * inner, 3 * inner, 1, groups=3 * heads, bias=False),
            )
            for size in multiscales
        )
        self.out = nn.Conv2d(inner * (1 + len(multiscales)), width, 1, bias=False)
        self.norm = RmsNorm2d(width, GAIN, backend=backend)

    def forward(self, x: Tensor) -> Tensor:
        if uses_fast(self.backend, x, *self.parameters()):
            return self.merge(self.attend_channels_last(x), x)
        q, k, v = self.split(self.project(x))
        return self.merge(relu_attention(q, k, v), x)

    def state(self, x: Tiled) -> Tensor:
        """Sum of keys and values over the whole grid, (B, G, D + 1, D), accumulated over its tiles."""
        tiles = x.then(self.project, reach_same(self.radius)).tiles()
        kv = (self.split(values)[1:] for _, values in tiles)
        return functools.reduce(Tensor.add, (at_least_float32(attention_state(k, v)) for k, v in kv))

    def query(self, x: Tensor, state: Tensor) -> Tensor:
        """x + attention of a tile's queries to the whole grid, given its state."""
        return self.merge(read_state(self.split(self.project(x))[0], state), x)

    def project(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3 G D, h, w)."""
        qkv = self.qkv(x)
        return torch.cat([qkv, *(scale(qkv) for scale in self.scales)], dim=1)

    def split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """q, k and v, each (B, G, D, N)."""
        return qkv.flatten(2).unflatten(1, (-1, 3 * self.head_dim)).chunk(3, dim=2)

    def merge(self, y: Tensor, x: Tensor) -> Tensor:
        """x + the output projection of y (B, G, D, N), in the shape of x (B, C, h, w)."""
        return self.norm(self.out(y.to(x.dtype).reshape(x.shape[0], -1, *x.shape[2:])), x)

    def attend_channels_last(self, x: Tensor) -> Tensor:
        """Attention of each scale without the copies of `project` and `split`.

        Channels-last (B, C, h, w) -> (B, heads of all scales x D, h, w).
        """
        qkv = self.qkv(x)
        scales = (cast("nn.Sequential", scale) for scale in self.scales)
        scaled = (grouped_conv1x1(cast("nn.Conv2d", scale[1]), scale[0](qkv)) for scale in scales)
        heads = [tokens(qkv).unflatten(2, (-1, 3, self.head_dim)), *(y.unflatten(2, (-1, 3)) for y in scaled)]
        y = torch.cat([linear_attention(*part.unbind(3), eps=EPS).flatten(2) for part in heads], dim=2)
        return y.mT.unflatten(2, x.shape[2:])


def tokens(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, N, C); a view of channels-last memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def grouped_conv1x1(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A grouped 1x1 convolution as batched matrix products, (B, C, h, w) -> (B, N, groups, C / groups)."""
    batch, cells = len(x), tokens(x)
    cells = cells.unflatten(2, (conv.groups, -1)).flatten(0, 1).transpose(0, 1)  # (groups, B N, C / groups)
    weight = conv.weight.flatten(1).unflatten(0, (conv.groups, -1))
    return (cells @ weight.mT).transpose(0, 1).unflatten(0, (batch, -1))


def relu_attention(q: Tensor, k: Tensor, v: Tensor, eps: float = EPS) -> Tensor:
    """Attention with weights relu(q) . relu(k), each (B, G, D, N) -> same, in float32 or wider.

    The products are taken in the cheaper order: D x D if N > D, else N x N.
    """
    if q.shape[-1] <= q.shape[-2]:
        weights = F.relu(at_least_float32(k)).mT @ F.relu(at_least_float32(q))
        return at_least_float32(v) @ (weights / (weights.sum(-2, keepdim=True) + eps))
    return read_state(q, attention_state(k, v), eps)


def attention_state(k: Tensor, v: Tensor) -> Tensor:
    """sum over N of [v, 1] relu(k)^T for k, v (B, G, D, N): (B, G, D + 1, D); the last row is the normaliser's."""
    return F.pad(at_least_float32(v), (0, 0, 0, 1), value=1.0) @ F.relu(at_least_float32(k)).mT


def read_state(q: Tensor, state: Tensor, eps: float = EPS) -> Tensor:
    """Attention of queries (B, G, D, N) to the keys and values in a state (B, G, D + 1, D) -> (B, G, D, N)."""
    y = state @ F.relu(at_least_float32(q))
    return y[:, :, :-1] / (y[:, :, -1:] + eps)


class GluMbConv(nn.Module):
    """x + gated feed-forward: 1x1 up, 3x3 depthwise, SiLU gate, 1x1 down; (B, C, h, w) -> same (GLUMBConv).

    Between the 1x1 convolutions it is SANA's Mix-FFN, so that in inference its kernel runs where it can.
    """

    kernel: Backend = "auto"  # of the part between the 1x1 convolutions

    def __init__(self, width: int, expand: int = 4, backend: Fast = "auto") -> None:
        super().__init__()
        hidden = expand * width
        self.inverted = nn.Conv2d(width, 2 * hidden, 1)
        self.depthwise = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.point = nn.Conv2d(hidden, width, 1, bias=False)
        self.norm = RmsNorm2d(width, GAIN, backend=backend)
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        fast = uses_fast(self.backend, x, *self.parameters())
        return self.norm(self.point(self.gated(self.inverted(x), fast)), x)

    def gated(self, y: Tensor, fast: bool) -> Tensor:
        """Activation, depthwise convolution and gate: (B, 2 M, h, w) -> (B, M, h, w)."""
        cells, weight, bias = y.permute(0, 2, 3, 1), self.depthwise.weight, cast(Tensor, self.depthwise.bias)
        if fast and cells.is_contiguous() and choose(self.kernel, y.device, unsupported(cells, weight)) == "triton":
            return mix_ffn(cells, weight, bias, backend="triton").permute(0, 3, 1, 2)
        value, gate = self.depthwise(F.silu(y, inplace=fast)).chunk(2, dim=1)
        gate = F.silu(gate, inplace=fast)
        return gate.mul_(value) if fast else value * gate


class RmsNorm2d(nn.Module):
    """RMSNorm over the channels of (B, C, h, w) with weight and bias, plus an optional residual.

    Statistics in float32 or wider; `gain` is the initial weight.
    """

    def __init__(self, width: int, gain: float = 1.0, eps: float = 1e-5, backend: Fast = "auto") -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.full((width,), gain)), nn.Parameter(torch.zeros(width))
        self.eps, self.backend = eps, backend

    def parts(self) -> Norm:
        return Norm(self.weight, self.bias, self.eps)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return rms_norm_2d(x, *self.parts(), residual, self.backend)


def batch_norm_2d(width: int) -> nn.BatchNorm2d:
    """Batch norm with the initial weight of the other norms that end a residual branch."""
    norm = nn.BatchNorm2d(width)
    nn.init.constant_(norm.weight, GAIN)
    return norm


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or unchanged if it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def average_channels(x: Tensor, out: int) -> Tensor:
    """(B, C, h, w) -> (B, out, h, w): the mean of each run of C / out channels."""
    return x.unflatten(1, (out, -1)).mean(2)


def repeat_channels(x: Tensor, out: int) -> Tensor:
    """(B, C, h, w) -> (B, out, h, w): each channel out / C times in a row."""
    return x.repeat_interleave(out // x.shape[1], dim=1)


def add_averaged(x: Tensor, y: Tensor, backend: Fast) -> Tensor:
    """y (B, C', h, w) plus the space-to-channel shortcut of x (B, C, 2h, 2w): pixel unshuffle, averaged to C'."""
    channels, out = x.shape[1], y.shape[1]
    averaged = 4 * channels // out  # cells of x averaged to one of y
    if averaged not in DISTINCT_CELLS or x.dtype not in IN_PLACE_SUMS or not uses_fast(backend, x, y):
        return y + average_channels(F.pixel_unshuffle(x, 2), out)
    to = y.unflatten(1, (channels, *DISTINCT_CELLS[averaged]))  # (B, C, rows, columns, h, w)
    for i, j in itertools.product(range(2), repeat=2):
        to[:, :, i % to.shape[2], j % to.shape[3]].add_(x[..., i::2, j::2], alpha=1 / averaged)
    return y


def add_duplicated(x: Tensor, y: Tensor, backend: Fast) -> Tensor:
    """y (B, C', 2h, 2w) plus the channel-to-space shortcut of x (B, C, h, w): repeated to 4 C', pixel shuffle."""
    out = y.shape[1]
    repeated = 4 * out // x.shape[1]  # cells of y that get one of x
    if repeated not in DISTINCT_CELLS or not uses_fast(backend, x, y):
        return y + F.pixel_shuffle(repeat_channels(x, 4 * out), 2)
    cells = y.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (B, C', h, 2, w, 2)
    cells.add_(x.unflatten(1, (out, *DISTINCT_CELLS[repeated])).permute(0, 1, 4, 2, 5, 3))
    return y


DISTINCT_CELLS = {4: (1, 1), 2: (2, 1), 1: (2, 2)}
"""Number of cells of a 2x2 block that share one value -> number of distinct rows and columns of the block."""

IN_PLACE_SUMS = (torch.float32, torch.float64)
"""Dtypes precise enough to round after each term of an average."""
