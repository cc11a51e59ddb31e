"""Building of parts: with the weights that their specs name, and without them."""

from typing import Any

import torch
from torch import nn

from sana_lab.config import registry, specs


def build(kind: str, spec: specs.Spec, **supplied: Any) -> Any:
    """The part that a spec names, with its weights loaded where the spec says `weights` or is `experiment:NAME`.

    A function gets its options bound. `supplied` are arguments that no spec sets, such as the channels of a DiT. On the
    meta device nothing is loaded. SpecError where the spec is wrong, or the weights are missing or do not fit.
    """
    from sana_lab.config import experiments  # here, as every system imports this module

    part = specs.build(kind, experiments.resolve(kind, spec), **supplied)
    if kind in registry.WEIGHTED and "weights" in part.spec:
        load_into(part, part.spec["weights"], kind)
    return part


def build_on_meta(kind: str, spec: specs.Spec, **supplied: Any) -> Any:
    """The part on the meta device: names, shapes and costs without memory, and without any file of weights."""
    with torch.device("meta"):
        return build(kind, spec, **supplied)


def without_weights(spec: dict[str, Any]) -> dict[str, Any]:
    """The spec, and every spec in it, without `weights`: parts as they are initialised."""
    return {k: without_weights(v) if isinstance(v, dict) else v for k, v in spec.items() if k != "weights"}


def load_into(module: nn.Module, reference: str, kind: str) -> None:
    """Load a part's weights from a file, `experiment:NAME`, or a released model: NVlabs' .pth, a diffusers folder or a
    hub id. Nothing is loaded on the meta device. SpecError."""
    from sana_lab.checkpoints import formats, weights

    if any(p.is_meta for p in module.parameters()):
        return
    if formats.is_released(reference):
        _load_released(module, reference, kind)
    else:
        weights.load_state(module, weights.read(weights.find(reference)), f"{kind}.", reference)


def _load_released(module: nn.Module, reference: str, kind: str) -> None:
    from sana_lab.checkpoints import formats, hub

    spec: Any = module.spec
    released = formats.recognise(hub.locate(reference), kind, like=spec)
    formats.check_kind(kind, released, reference)
    formats.check_agree(spec, released)
    module.load_state_dict(formats.state_for(module, released))
