"""Arithmetic operations and parameters of a model, counted from shapes.

FLOPs = 2 MACs. Matrix products, convolutions and attention products are counted, forward and backward; elementwise
operations, norms, softmaxes and table look-ups are not. Causal and masked attention counts as dense.
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
    "1 MAC = 2 FLOPs; products of matrices, convolutions and attention are counted (masked attention as dense), "
    "elementwise operations, norms and look-ups are not"
)

CAPTION_TOKENS = 300

PAIR = (
    f"a denoiser forward of the two rows that guidance needs, captions of {CAPTION_TOKENS} tokens, without the "
    "products of image queries with caption keys and values: the convention that reproduces the SANA paper's Table 8 "
    "(inferred from its numbers)"
)
"""Definition of `count_pair_macs`."""


def count_macs(call: Callable[[], Any]) -> int:
    """Multiply-accumulates of one call, which is run once; exact on the meta device too.

    PyTorch's counter counts fused softmax attention on the CPU as zero and the backward of a depthwise convolution as
    dense; corrected formulas are used for this count only. A custom kernel counts only if it is a registered operator
    with a formula; it may be registered during the call.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_formulas())
    counter.flop_registry = ChainMap(counter.flop_registry, flop_registry)  # type: ignore[assignment]
    with counter:
        call()
    return counter.get_total_flops() // 2


def count_pair_macs(denoise: Callable[..., Any], latent: Sequence[int], text_dim: int) -> int:
    """MACs by the definition `PAIR` of a denoiser on the meta device: latents (C, h, w), caption features of width
    `text_dim`."""
    with torch.device("meta"):
        x, t = torch.empty(2, *latent), torch.empty(2)
        text = Text(torch.empty(2, CAPTION_TOKENS, text_dim), torch.ones(2, CAPTION_TOKENS, dtype=torch.bool))
    with _FreeCrossAttention():
        return count_macs(lambda: denoise(x, t, text))


@contextmanager
def expanded_masks(module: nn.Module) -> Iterator[None]:
    """Give transformers networks inside `module` an all-true attention mask (B, 1, L, L) instead of (B, L) or none.

    transformers reads the values of a smaller mask, which meta tensors do not have. The count does not change.
    """

    def expand(_: nn.Module, args: Any, kwargs: Any) -> Any:
        mask, ids = kwargs.get("attention_mask"), kwargs.get("input_ids")
        like = ids if mask is None else mask
        if like is None or like.ndim != 2:
            return args, kwargs
        rows, length = like.shape
        return args, {**kwargs, "attention_mask": like.new_ones(rows, 1, length, length, dtype=torch.bool)}

    networks = [m for m in module.modules() if hasattr(m, "config") and hasattr(m, "get_input_embeddings")]
    hooks = [m.register_forward_pre_hook(expand, with_kwargs=True) for m in networks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _FreeCrossAttention(TorchFunctionMode):
    """Skip attention whose keys differ in number from its queries, so that it counts zero."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention and args[0].shape[-2] != args[1].shape[-2]:
            return args[0]
        return func(*args, **(kwargs or {}))


def count_parameters(module: nn.Module) -> dict[str, int]:
    """Number of parameters, total and trainable; a shared parameter counts once."""
    params = list(module.parameters())
    return {"total": sum(p.numel() for p in params), "trainable": sum(p.numel() for p in params if p.requires_grad)}


def parameters_by_component(components: dict[str, nn.Module]) -> dict[str, dict[str, int]]:
    """`count_parameters` of each component, and of "all" together."""
    total = count_parameters(nn.ModuleDict(components))
    return {"all": total, **{name: count_parameters(module) for name, module in components.items()}}


def _formulas() -> dict[Any, Callable[..., int]]:
    aten = torch.ops.aten
    fused = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
    forward = {getattr(aten, f"_scaled_dot_product_{name}"): _sdpa for name in fused}
    backward = {aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward}
    convolution = {aten.convolution_backward: _convolution_backward}
    solve = {aten.linalg_solve_triangular: _solve_triangular}
    return {**forward, **backward, **convolution, **solve, aten.mv: _mv, aten.dot: _dot}


def _sdpa(q: Shape, k: Shape, v: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """q k^T and its product with v; keys and values of grouped-query attention count once per query head."""
    batch, heads, n, d = q
    return 2 * batch * heads * n * k[-2] * (d + v[-1])


def _sdpa_backward(grad: Shape, q: Shape, k: Shape, v: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Five products: q k^T again, and the gradients of weights, values, queries, keys."""
    batch, heads, n, d = q
    return 2 * batch * heads * n * k[-2] * (3 * d + 2 * v[-1])


def _convolution_backward(grad: Shape, x: Shape, weight: Shape, *rest: Any, out_shape: Any = None, **__: Any) -> int:
    """The gradients of input and weight, each as many MACs as the forward; PyTorch's formula ignores groups."""
    *_, transposed, _, _, output_mask = rest
    return 2 * math.prod(x if transposed else grad) * math.prod(weight[1:]) * sum(output_mask[:2])


def _solve_triangular(a: Shape, b: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Substitution: each of n rows takes a product with the rows solved before it; divisions are not counted."""
    *batch, n, columns = b
    return math.prod(batch) * n * (n - 1) * columns


def _mv(matrix: Shape, vector: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * matrix[0] * matrix[1]


def _dot(a: Shape, b: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * a[0]
