"""Masks for the networks of transformers that it takes as they are.

Given a mask of tokens (B, L), it looks whether all are real: on a GPU the host waits there, once for each batch. What
it would make of the mask is made here, by what is known before the mask leaves the host.
"""

from typing import Any

import torch
from torch import Tensor

CAUSAL = ("gemma", "gemma2", "llama", "mistral", "qwen2", "qwen3")
"""Decoders whose attention sees what lies before a token, and no more."""

BOTH_WAYS = ("t5",)
"""Encoders whose attention sees all real tokens."""


def attention_mask(network: Any, mask: Tensor, there: Tensor, before: int = 0) -> Tensor | None:
    """What to give the network as `attention_mask`: what transformers makes of a mask (B, L) bool, which is on the CPU
    and `there`, on the network's device; the mask itself where that is not known here. `before` tokens, all real, were
    read earlier."""
    whole = torch.cat([there.new_ones(len(there), before), there], 1) if before else there
    if not _known(network.config, whole.shape[1]):
        return whole
    exact, causal = network.config._attn_implementation == "eager", network.config.model_type in CAUSAL
    looks = causal and there.device.type != "cpu"  # a decoder without a mask looks whether its positions begin anew
    if not exact and not before and not looks and bool(mask.all()):
        return None
    seen = _seen(whole, causal)[:, :, before:]
    return _additive(seen, network.dtype) if exact else seen


def _known(config: Any, length: int) -> bool:
    window = getattr(config, "sliding_window", None)
    kind = config.model_type in (*CAUSAL, *BOTH_WAYS) and config._attn_implementation in ("sdpa", "eager")
    return kind and (window is None or length < window)


def _seen(mask: Tensor, causal: bool) -> Tensor:
    """(B, 1, L, L) bool: which token (last) each token sees."""
    rows, length = mask.shape
    seen = mask[:, None, None].expand(rows, 1, length, length)
    return seen & torch.ones(length, length, dtype=torch.bool, device=mask.device).tril() if causal else seen


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)
