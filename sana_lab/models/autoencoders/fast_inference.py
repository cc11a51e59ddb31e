"""Helpers of autoencoders for fast inference without gradients (option `backend`)."""

import torch
from torch import Tensor, nn

from sana_lab.ops.conv import conv3x3
from sana_lab.ops.inference_backend import Fast, uses_fast


def channels_last(x: Tensor, backend: Fast, *parameters: Tensor) -> Tensor:
    """x (B, C, h, w) in channels-last memory if the backend selects the fast form, else unchanged."""
    return x.contiguous(memory_format=torch.channels_last) if uses_fast(backend, x, *parameters) else x


def apply_conv3x3(conv: nn.Conv2d, x: Tensor, backend: Fast, residual: Tensor | None = None) -> Tensor:
    """A 3x3 convolution of stride 1 and padding 1, plus an optional residual of the output's shape."""
    return conv3x3(x, conv.weight, conv.bias, residual=residual, backend=backend)
