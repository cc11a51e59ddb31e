"""Building of parts together with the weights that their specs name."""

from typing import Any

from sana_lab.checkpoints import weights
from sana_lab.config import experiments, registry, specs


def build(kind: str, spec: specs.Spec, **supplied: Any) -> Any:
    """The part that a spec names, with its weights loaded where the spec says `weights` or is `experiment:NAME`.

    A function gets its options bound. `supplied` are arguments that no spec sets, such as the channels of a DiT. On the
    meta device nothing is loaded. SpecError where the spec is wrong, or the weights are missing or do not fit.
    """
    part = specs.build(kind, experiments.resolve(kind, spec), **supplied)
    if kind in registry.WEIGHTED and "weights" in part.spec:
        weights.load_into(part, part.spec["weights"], kind)
    return part
