"""Activation checkpointing of blocks: which activations the forward pass keeps for the backward pass."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from torch import Tensor, is_grad_enabled
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Checkpointing = bool | Literal["selective"]
"""False keeps all activations, True only the blocks' inputs. `selective` also keeps the results of matrix products and
attention, and recomputes large, cheap operations: norms, modulation, gates, Mix-FFN's 3x3 and activations."""

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear")


def run(block: Callable[..., Any], mode: Checkpointing, *arguments: Tensor | None) -> Any:
    """block(*arguments); the gradients do not depend on the mode."""
    if not mode or not is_grad_enabled():
        return block(*arguments)
    if mode is True:
        return checkpoint(block, *arguments, use_reentrant=False)
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(block, *arguments, use_reentrant=False, context_fn=contexts)


def _policy(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    name = operator.overloadpacket.__name__ if hasattr(operator, "overloadpacket") else str(operator)
    expensive = name in PRODUCTS or "attention" in name
    return CheckpointPolicy.MUST_SAVE if expensive else CheckpointPolicy.PREFER_RECOMPUTE
