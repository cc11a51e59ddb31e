"""Linear layers with large inputs as 1x1 convolutions, for CPUs with AVX-512.

oneDNN's convolution, which packs its weights at every call, was 3 to 13 % faster than MKL's matrix product at
SANA-0.6B's shapes, 512 tokens and two threads. Both sum the same products in different orders.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_lab.ops.backend import Backend

MIN_PRODUCTS = 2**28
"""Number of multiplications above which packing the weights is worthwhile."""


def product(layer: nn.Linear, x: Tensor, backend: Backend = "auto") -> Tensor:
    """`layer(x)` for tokens (..., K) -> (..., N); `auto` selects the form that is expected to be faster."""
    return by_convolution(layer, x) if backend == "auto" and pays(layer, x) else layer(x)


def by_convolution(layer: nn.Linear, x: Tensor) -> Tensor:
    """`layer(x)` as a 1x1 convolution of one channels-last image with one row per token."""
    image = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    out = F.conv2d(image, layer.weight[:, :, None, None], layer.bias)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(layer.weight))


def pays(layer: nn.Linear, x: Tensor) -> bool:
    """Whether the convolution is expected to be faster: large float32 products in inference on a CPU with AVX-512."""
    plain = type(layer) is nn.Linear and type(layer.weight) is nn.Parameter  # quantised weights have their own
    hooked = layer._forward_hooks or layer._forward_pre_hooks  # the convolution would not call them
    if (
        not plain
        or hooked
        or x.device.type != "cpu"
        or x.dtype != torch.float32
        or x.numel() * len(layer.weight) < MIN_PRODUCTS
    ):
        return False
    training = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
    return not training and torch.backends.cpu.get_cpu_capability() == "AVX512"
