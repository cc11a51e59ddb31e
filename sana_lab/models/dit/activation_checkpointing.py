"""What a block's forward keeps for its backward: all, what is dear to compute, or nothing but its input."""

from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Checkpointing = bool | Literal["selective"]
"""False keeps everything, True the blocks' inputs alone. `selective` keeps the results of matrix products and of
attention, and computes again what is large and cheap: norms, modulation, gates, and Mix-FFN's 3x3 and activations."""

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear")


def run(block: nn.Module, how: Checkpointing, *arguments: Tensor | None) -> Any:
    """block(*arguments), whose gradients are the same whatever is kept."""
    if not how:
        return block(*arguments)
    if how is True:
        return checkpoint(block, *arguments, use_reentrant=False)
    chosen = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(block, *arguments, use_reentrant=False, context_fn=chosen)


def _policy(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    name = operator.overloadpacket.__name__ if hasattr(operator, "overloadpacket") else str(operator)
    dear = name in PRODUCTS or "attention" in name
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE
