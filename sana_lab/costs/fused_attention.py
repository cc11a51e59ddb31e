"""Attention on the meta device as a fused kernel, which keeps no matrix of scores; torch's own choice there is not."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PLAIN = F.scaled_dot_product_attention


@contextmanager
def fused_attention() -> Iterator[None]:
    """Context in which `scaled_dot_product_attention` of tensors on the meta device is one operator.

    The function is replaced in every thread, as a backward pass recomputes in threads of its own.
    """

    def attention(query: Tensor, *arguments: Any, **options: Any) -> Tensor:
        return (_fused if query.device.type == "meta" else PLAIN)(query, *arguments, **options)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = PLAIN


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **options: Any,
) -> Tensor:
    if query.shape[-1] != value.shape[-1] or options.get("enable_gqa"):  # no kernel of the CPU
        return PLAIN(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options)
    mask = attn_mask if attn_mask is None or attn_mask.dtype != torch.bool else attn_mask.to(query.dtype)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out: Tensor = kernel(query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale)[0]
    return out
