"""One part from a state dict: built on the meta device to avoid double allocation, then filled."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sana_lab.checkpoints import formats, mismatch
from sana_lab.checkpoints.build import build_on_meta
from sana_lab.config.validation import SpecError
from sana_lab.models.dit import Dit


def from_released(weights: formats.ReleasedWeights, kind: str | None = None) -> nn.Module:
    """The part of weights in another format. SpecError if it is not of the kind or the weights do not fit."""
    if kind not in (None, weights.kind):
        raise SpecError(f"{weights.source} holds a {weights.kind} ({weights.spec['name']}), and a {kind} was asked for")
    part = build_on_meta(weights.kind, weights.spec, **weights.supplied)
    return fill(part, formats.state_for(part, weights), weights.source)


def fill(part: nn.Module, state: Mapping[str, Tensor], source: str) -> nn.Module:
    """The part in evaluation mode, with these tensors themselves as its parameters. SpecError if one is not
    finite."""
    mismatch.check_finite(state, source)
    part.load_state_dict(state, assign=True)
    return part.eval()


def supplied(part: nn.Module) -> dict[str, Any]:
    """The arguments of a part's constructor that are not in its spec."""
    return {"channels": part.channels, "text_dim": part.text_dim} if isinstance(part, Dit) else {}
