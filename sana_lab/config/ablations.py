"""Ablations: a base experiment, axes of labelled overrides and seeds, expanded to trials."""

from collections.abc import Iterable, Sequence
from itertools import product

from sana_lab.config import specs
from sana_lab.config.experiments import _with_suite, apply, complete, compose, locate, merge, nest, read
from sana_lab.config.schema import Ablation, Config, Expectation, Trial
from sana_lab.config.specs import SpecError, nearest


def load_ablation(name: str, overrides: Sequence[str] = (), scale: str | None = None) -> tuple[Ablation, list[Trial]]:
    """An ablation at a scale, and its trials, each a complete experiment; all are checked before the first runs."""
    raw = at_scale(read(locate("ablations", name)), scale, name)
    checked = specs.complete(specs.fields(Ablation), raw, f"ablation {name!r}", name)
    ablation = Ablation(**{**checked, "expect": [Expectation(**e) for e in checked["expect"]]})
    if not ablation.axes or not all(ablation.axes.values()):
        raise SpecError(
            f"ablation {name!r} has no axes with labels; expected axes: {{attention: {{softmax: ..., ...}}}}"
        )
    trials = [t for seed in ablation.seeds for t in _trials(ablation, seed, overrides)]
    check_order(ablation.expect, {t.label for t in trials}, name)
    return ablation, trials


def at_scale(raw: Config, scale: str | None, name: str) -> Config:
    """An ablation's YAML with what a scale puts in the place of its own keys. SpecError for an unknown one."""
    scales = raw.get("scales") or {}
    if scale is None or not isinstance(scales, dict):
        return raw
    if scale not in scales:
        raise SpecError(f"ablation {name!r} has no scale {scale!r}; {nearest(scale, scales)}")
    return {**raw, **scales[scale]}


def check_order(expect: Sequence[Expectation], labels: set[str], name: str) -> None:
    """SpecError where something is expected of a row that is none."""
    for label in (label for e in expect for label in e.order):
        if label not in labels:
            raise SpecError(
                f"ablation {name!r} expects something of {label!r}, which is no row; {nearest(label, labels)}"
            )


def _trials(ablation: Ablation, seed: int, overrides: Sequence[str]) -> Iterable[Trial]:
    axes = [[(axis, label, over) for label, over in labels.items()] for axis, labels in ablation.axes.items()]
    for combination in product(*axes):
        config = merge(compose(ablation.base), _with_suite(nest(ablation.common)))
        for _, _, over in combination:
            config = merge(config, _with_suite(nest(over or {})))
        if ablation.prompts:
            config["prompts"] = ablation.prompts
        labels = {axis: str(label) for axis, label, _ in combination}
        title = f"{ablation.title}: {' · '.join(labels.values())}"
        yield Trial(labels, seed, complete(apply({**config, "seed": seed}, overrides), title))
