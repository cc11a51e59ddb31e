"""Building of parts: with the weights that their specs name, and without them."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from sana_lab.checkpoints.meta import on_meta
from sana_lab.config import registry, specs
from sana_lab.config.memo import reuse


def build(kind: str, spec: specs.Spec, **supplied: Any) -> Any:
    """Build the part of a spec, with weights loaded if the spec has `weights` or is `experiment:NAME`.

    A function gets its options bound. `supplied` are arguments that no spec sets, such as the channels of a DiT. On the
    meta device nothing is loaded. SpecError if the spec is wrong, or the weights are missing or do not fit.
    """
    if torch.get_default_device().type == "meta":
        return reuse(("on meta", kind, spec, supplied), lambda: _build(kind, spec, supplied))
    return _build(kind, spec, supplied)


def _build(kind: str, spec: specs.Spec, supplied: dict[str, Any]) -> Any:
    from sana_lab.config import experiments  # here, as every system imports this module

    part = specs.build(kind, experiments.resolve(kind, spec), **supplied)
    for each in with_weights(kind, part):
        load_into(each, each.spec["weights"], kind)
    return part


def with_weights(kind: str, part: Any) -> list[Any]:
    """The part itself and the parts of its kind inside it, inner ones first, where a spec names weights."""
    if kind not in registry.WEIGHTED:
        return []
    base = specs.base_of(kind)
    return [m for m in reversed([*part.modules()]) if isinstance(m, base) and "weights" in getattr(m, "spec", {})]


def build_on_meta(kind: str, spec: specs.Spec, **supplied: Any) -> Any:
    """The part on the meta device: names, shapes and costs without memory, and without any file of weights."""
    with on_meta():
        return build(kind, spec, **supplied)


def without_weights(spec: dict[str, Any]) -> dict[str, Any]:
    """The spec, and every nested spec, without `weights`: freshly initialised parts."""
    return {k: without_weights(v) if isinstance(v, dict) else v for k, v in spec.items() if k != "weights"}


def load_into(module: nn.Module, reference: str, kind: str) -> None:
    """Load a part's weights from a file, `experiment:NAME`, or a released model: NVlabs' .pth, a diffusers folder or a
    hub id. Nothing is loaded on the meta device. SpecError."""
    from sana_lab.checkpoints import files, formats, weights

    if any(p.is_meta for p in module.parameters()):
        return
    if reference.endswith(files.TORCH_SUFFIXES) and Path(reference).is_file():
        _load_torch(module, reference, kind)
    elif formats.is_released(reference):
        _load_released(module, reference, kind)
    else:
        weights.load_state(module, weights.read(weights.find(reference)), f"{kind}.", reference)


def _load_torch(module: nn.Module, path: str, kind: str) -> None:
    """A file of torch.save: a checkpoint with this module's own names in it, or a released model."""
    from sana_lab.checkpoints import files, state_dicts, weights

    names = list(module.state_dict())
    state = state_dicts.choose(files.read_torch(Path(path)), (names[0], names[-1]), None, path)
    if state is None:
        _load_released(module, path, kind)
    else:
        weights.load_state(module, state.tensors, f"{kind}.", path)


def _load_released(module: nn.Module, reference: str, kind: str) -> None:
    from sana_lab.checkpoints import formats, hub, mismatch

    spec: Any = module.spec
    released = formats.recognise(hub.locate(reference), kind, like=spec)
    formats.check_kind(kind, released, reference)
    formats.check_agree(spec, released)
    state = formats.state_for(module, released)
    mismatch.check_finite(state, reference)
    module.load_state_dict(state)
