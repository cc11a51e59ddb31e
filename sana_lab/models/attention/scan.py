"""Order in which a recurrent mixer reads a grid of tokens (DiG, arXiv 2405.18428): one of four directions.

The order flips in every second layer and is transposed in every second pair, so that four layers read rows, rows
backwards, columns, columns backwards.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sana_lab.config.specs import SpecError


def read(x: Tensor, direction: int) -> Tensor:
    """Tokens (B, h, w, C) -> (B, N, C) in the order of a direction; any integer, of period 4."""
    flat = (x.transpose(1, 2) if direction // 2 % 2 else x).flatten(1, 2)
    return flat.flip(1) if direction % 2 else flat


def write(x: Tensor, h: int, w: int, direction: int) -> Tensor:
    """Inverse of `read`: (B, N, C) -> (B, h, w, C)."""
    x = x.flip(1) if direction % 2 else x
    return x.unflatten(1, (w, h)).transpose(1, 2) if direction // 2 % 2 else x.unflatten(1, (h, w))


def widened(x: Tensor) -> Tensor:
    """In float32, or float64 if it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def chunked(x: Tensor, size: int) -> Tensor:
    """(B, N, H, D) -> (B, H, chunks, size, D), padded with zeros at the end."""
    padded = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % size))
    return padded.unflatten(1, (-1, size)).permute(0, 3, 1, 2, 4)


def joined(x: Tensor, length: int) -> Tensor:
    """Inverse of `chunked`: (B, H, chunks, size, D) -> (B, N, H, D)."""
    return x.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :length]


class Depthwise(nn.Conv2d):
    """Depthwise convolution of tokens (B, h, w, C), with zero padding, that begins as the identity."""

    def __init__(self, dim: int, kernel: int) -> None:
        if kernel % 2 == 0:
            raise SpecError(
                f"the depthwise convolution's kernel is {kernel}, expected an odd side, such as {kernel + 1}"
            )
        super().__init__(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=False)
        nn.init.dirac_(self.weight, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
