"""What autoencoders share to compute quickly where no gradient is recorded."""

import torch
from torch import Tensor, nn

from sana_lab.ops.conv.conv3x3 import conv3x3
from sana_lab.ops.inference_backend import Fast, taken


def channels_last(x: Tensor, backend: Fast, *parameters: Tensor) -> Tensor:
    """x (B, C, h, w) in the memory order of fast inference, or as it is."""
    return x.contiguous(memory_format=torch.channels_last) if taken(backend, x, *parameters) else x


def convolved(conv: nn.Conv2d, x: Tensor, backend: Fast, residual: Tensor | None = None) -> Tensor:
    """x through a 3x3 convolution that keeps the grid, and a residual if given."""
    return conv3x3(x, conv.weight, conv.bias, residual=residual, backend=backend)
