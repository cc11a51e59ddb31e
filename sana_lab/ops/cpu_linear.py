"""Linear layers of large inputs on a CPU with AVX-512, as 1x1 convolutions.

oneDNN's convolution, which packs its weights at every call, was 3 to 13 % faster there than MKL's matrix product at
SANA-0.6B's shapes, 512 tokens and two threads. Both add the same products, in another order.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_lab.ops.backend import Backend

MIN_PRODUCTS = 2**28
"""Multiplications from which packing the weights pays."""


def product(layer: nn.Linear, x: Tensor, backend: Backend = "auto") -> Tensor:
    """`layer(x)` of tokens (..., K) -> (..., N); `auto` uses the form that is expected to be faster."""
    return by_convolution(layer, x) if backend == "auto" and pays(layer, x) else layer(x)


def by_convolution(layer: nn.Linear, x: Tensor) -> Tensor:
    """`layer(x)` as a 1x1 convolution of one image with a row for each token, channels last."""
    image = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    out = F.conv2d(image, layer.weight[:, :, None, None], layer.bias)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(layer.weight))


def pays(layer: nn.Linear, x: Tensor) -> bool:
    """Whether the convolution is expected to be faster: large float32 products in inference, on such a CPU."""
    plain = type(layer) is nn.Linear and type(layer.weight) is nn.Parameter  # quantised weights have their own product
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
