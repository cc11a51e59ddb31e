"""Attention masks for transformers networks, built without a device synchronisation.

Given a token mask (B, L), transformers checks whether every token is valid, which on a GPU synchronises the host with
the device at each batch. The same masks (`masking_utils.py`) are built here from the mask's copy on the host.
"""

from typing import Any

import torch
from torch import Tensor

CAUSAL_MODELS = ("gemma", "gemma2", "llama", "mistral", "qwen2", "qwen3")
"""`model_type` of decoders: a token attends to itself and earlier tokens."""

BIDIRECTIONAL_MODELS = ("t5",)
"""`model_type` of encoders: a token attends to all real tokens."""


def attention_mask(network: Any, mask: Tensor, device_mask: Tensor, prefix: int = 0) -> Tensor | None:
    """The `attention_mask` argument of `network`, or None if it needs none.

    `mask` (B, L) bool is on the CPU and `device_mask` is its copy on the network's device. `prefix` real tokens, whose
    keys and values are cached, precede the L tokens. Returns (B, 1, L, prefix + L), bool for SDPA and additive for
    eager attention; for other networks the token mask (B, prefix + L), from which transformers builds its own.
    """
    tokens = torch.cat([device_mask.new_ones(len(device_mask), prefix), device_mask], 1) if prefix else device_mask
    if not _supported(network.config, tokens.shape[1]):
        return tokens
    eager, causal = network.config._attn_implementation == "eager", network.config.model_type in CAUSAL_MODELS
    synchronises = causal and device_mask.device.type != "cpu"  # without a mask, decoders look for packed sequences
    if not eager and not prefix and not synchronises and bool(mask.all()):
        return None
    visible = _visible(tokens, causal)[:, :, prefix:]
    return _additive(visible, network.dtype) if eager else visible


def _supported(config: Any, length: int) -> bool:
    window = getattr(config, "sliding_window", None)
    models = (*CAUSAL_MODELS, *BIDIRECTIONAL_MODELS)
    kind = config.model_type in models and config._attn_implementation in ("sdpa", "eager")
    return kind and (window is None or length < window)


def _visible(mask: Tensor, causal: bool) -> Tensor:
    """(B, L) -> (B, 1, L, L) bool: whether a query (third axis) attends to a key (last axis)."""
    rows, length = mask.shape
    keys = mask[:, None, None].expand(rows, 1, length, length)
    return keys & torch.ones(length, length, dtype=torch.bool, device=mask.device).tril() if causal else keys


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible, else the dtype's lowest number."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, torch.finfo(dtype).min)
