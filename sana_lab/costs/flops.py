"""Arithmetic and parameters, counted from shapes: what a model costs on any machine.

FLOPs = 2 MACs. Matrix products, convolutions and attention products are counted, forward and backward; elementwise
operations, norms, softmaxes and table look-ups are not. Causal and masked attention counts in full.
"""

import math
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from sana_lab.types import Text

Shape = Sequence[int]

DEFINITION = (
    "1 MAC = 2 FLOPs; products of matrices, convolutions and attention are counted (masked attention in full), "
    "elementwise operations, norms and look-ups are not"
)


CAPTION = 300

PAIR = (
    f"a denoiser forward of the two rows that guidance needs, captions of {CAPTION} tokens, without the products of "
    "image queries with caption keys and values: the counting that gives the SANA paper's Table 8, found by fitting it"
)


def count_macs(call: Callable[[], Any]) -> int:
    """Multiply-accumulates of one call, which is run once; exact on the meta device too.

    PyTorch's own counter takes fused softmax attention on the CPU for free, and the backward of a depthwise convolution
    for a dense one, so their formulas are added, for this count only. A hand-written kernel counts nothing unless it is
    a registered operator with a formula; one that is registered during the call, as kernels are at first, counts too.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_formulas())
    counter.flop_registry = ChainMap(counter.flop_registry, flop_registry)  # type: ignore[assignment]
    with counter:
        call()
    return counter.get_total_flops() // 2


def count_pair_macs(denoise: Callable[..., Any], latent: Sequence[int], text_dim: int) -> int:
    """MACs as `PAIR` says of a denoiser on the meta device: latents (C, h, w), caption features `text_dim` wide."""
    with torch.device("meta"):
        x, t = torch.empty(2, *latent), torch.empty(2)
        text = Text(torch.empty(2, CAPTION, text_dim), torch.ones(2, CAPTION, dtype=torch.bool))
    with _FreeCrossAttention():
        return count_macs(lambda: denoise(x, t, text))


@contextmanager
def whole_masks(module: nn.Module) -> Iterator[None]:
    """Within, every network of transformers on the meta device takes its mask (B, L) as (B, 1, L, L), which it looks
    at less: what a mask holds cannot be asked there. Masked attention counts in full either way."""

    def widen(_: nn.Module, args: Any, kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask")
        if mask is None or mask.ndim != 2:
            return args, kwargs
        rows, length = mask.shape
        return args, {**kwargs, "attention_mask": mask.new_ones(rows, 1, length, length, dtype=torch.bool)}

    hooks = [m.register_forward_pre_hook(widen, with_kwargs=True) for m in module.modules() if hasattr(m, "config")]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _FreeCrossAttention(TorchFunctionMode):
    """Attention to keys that are not as many as the queries costs nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention and args[0].shape[-2] != args[1].shape[-2]:
            return args[0]
        return func(*args, **(kwargs or {}))


def parameters(module: nn.Module) -> dict[str, int]:
    """How many numbers it holds; a shared parameter counts once."""
    found = list(module.parameters())
    return {"total": sum(p.numel() for p in found), "trainable": sum(p.numel() for p in found if p.requires_grad)}


def by_component(components: dict[str, nn.Module]) -> dict[str, dict[str, int]]:
    """`parameters` of each component, and of "all" together."""
    return {"all": parameters(nn.ModuleDict(components)), **{k: parameters(m) for k, m in components.items()}}


def _formulas() -> dict[Any, Callable[..., int]]:
    aten = torch.ops.aten
    fused = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
    forward = {getattr(aten, f"_scaled_dot_product_{name}"): _sdpa for name in fused}
    backward = {aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward}
    convolution = {aten.convolution_backward: _convolution_backward}
    return {**forward, **backward, **convolution, aten.mv: _mv, aten.dot: _dot}


def _sdpa(q: Shape, k: Shape, v: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """q k^T and its product with v; keys and values of grouped queries are used once per query head."""
    batch, heads, n, d = q
    return 2 * batch * heads * n * k[-2] * (d + v[-1])


def _sdpa_backward(grad: Shape, q: Shape, k: Shape, v: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Five products: q k^T again, and the gradients of weights, values, queries, keys."""
    batch, heads, n, d = q
    return 2 * batch * heads * n * k[-2] * (3 * d + 2 * v[-1])


def _convolution_backward(grad: Shape, x: Shape, weight: Shape, *rest: Any, out_shape: Any = None, **__: Any) -> int:
    """The gradients of input and weight, each as much as the forward; PyTorch's takes no account of groups."""
    *_, transposed, _, _, wanted = rest
    return 2 * math.prod(x if transposed else grad) * math.prod(weight[1:]) * sum(wanted[:2])


def _mv(matrix: Shape, vector: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * matrix[0] * matrix[1]


def _dot(a: Shape, b: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * a[0]
