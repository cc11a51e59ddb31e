"""The loader of `ablations/*.yaml`: a plan of trials, each with labels, a seed, a kind and a complete configuration.

A file with `base:` compares quality: a trial is an experiment, which is trained, evaluated and benchmarked. A file with
`probe:` compares efficiency: a trial is a probe, which is counted and timed.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from sana_lab.config import experiments, specs
from sana_lab.config.experiments import merge, nest
from sana_lab.config.schema import Ablation, Config, EfficiencyTable, Expectation, Trial
from sana_lab.config.specs import SpecError, nearest

EXAMPLES = {Ablation: "{attention: {softmax: ..., ...}}", EfficiencyTable: "{model: {a: ..., b: ...}}"}
"""What `axes:` of a kind of ablation may look like, for error messages."""


class Plan(NamedTuple):
    """An ablation at a scale, expanded to its trials; all of them are checked."""

    name: str  # of the sweep in MLflow, and of its folders under runs/
    table: Ablation | EfficiencyTable
    trials: list[Trial]


def load(recipe: str, overrides: Sequence[str] = (), scale: str | None = None) -> Plan:
    """Read an ablation by name or path. SpecError for anything that is wrong in the file or in any of its trials."""
    raw = at_scale(read(recipe), scale, recipe)
    table = _parse(EfficiencyTable if "probe" in raw else Ablation, raw, recipe)
    trials = list(_probes(table, overrides) if isinstance(table, EfficiencyTable) else _experiments(table, overrides))
    _check_labels(table, {trial.label for trial in trials}, recipe)
    return Plan(sweep_name(recipe, scale, overrides), table, trials)


def read(recipe: str) -> Config:
    """The YAML of an ablation, as it is."""
    return experiments.read(experiments.locate("ablations", recipe))


def compares_efficiency(recipe: str) -> bool:
    """Whether the trials of an ablation are probes, which nothing trains."""
    return "probe" in read(recipe)


def sweep_name(recipe: str, scale: str | None, overrides: Sequence[str] = ()) -> str:
    """The name of an ablation's runs: recipe, scale, and a hash of the overrides, which make it a sweep of its own."""
    changes = hashlib.sha256(json.dumps(list(overrides)).encode()).hexdigest()[:6]
    return "-".join([recipe.replace("/", "-"), *([scale] if scale else []), *([changes] if overrides else [])])


def at_scale(raw: Config, scale: str | None, recipe: str) -> Config:
    """An ablation's YAML with the keys that a scale replaces. SpecError for an unknown scale."""
    scales = raw.get("scales") or {}
    if scale is None or not isinstance(scales, dict):
        return raw
    if scale not in scales:
        raise SpecError(f"ablation {recipe!r} has no scale {scale!r}; {nearest(scale, scales)}")
    return {**raw, **scales[scale]}


def _parse(schema: type[Ablation] | type[EfficiencyTable], raw: Config, recipe: str) -> Ablation | EfficiencyTable:
    options = specs.complete(specs.fields(schema), raw, f"ablation {recipe!r}", recipe)
    table = schema(**{**options, "expect": [Expectation(**e) for e in options["expect"]]})
    if not table.axes or not all(table.axes.values()):
        raise SpecError(f"ablation {recipe!r} has no axes with labels; expected axes: {EXAMPLES[schema]}")
    return table


def _combinations(axes: Mapping[str, Mapping[str, Config | None]]) -> Iterator[tuple[dict[str, str], list[Config]]]:
    """Each cell of the product of the axes: its label on each axis, and the overrides of these labels."""
    for cell in product(*([(axis, label, change) for label, change in axes[axis].items()] for axis in axes)):
        yield {axis: str(label) for axis, label, _ in cell}, [nest(change or {}) for _, _, change in cell]


def _experiments(table: Ablation, overrides: Sequence[str]) -> Iterable[Trial]:
    for seed in table.seeds:
        for labels, changes in _combinations(table.axes):
            config = experiments.compose(table.base)
            for change in (nest(table.common), *changes):
                config = merge(config, experiments.with_suite(change))
            config |= {"prompts": table.prompts} if table.prompts else {}
            config = experiments.apply({**config, "seed": seed}, overrides)
            yield Trial(labels, seed, experiments.complete(config, _title(table, labels)))


def _probes(table: EfficiencyTable, overrides: Sequence[str]) -> Iterable[Trial]:
    """Each probe is built once, which allocates nothing, so that wrong options show at once."""
    for labels, changes in _combinations(table.axes):
        spec: dict[str, Any] = nest(table.probe)
        for change in changes:
            spec = merge(spec, change)
        resolved = specs.resolve("probe", experiments.apply(spec, overrides), _title(table, labels))
        specs.build("probe", resolved)
        config = {"probe": resolved, "repeats": table.repeats, "warmup": table.warmup}
        yield Trial(labels, 0, config, "efficiency")


def _title(table: Ablation | EfficiencyTable, labels: Mapping[str, str]) -> str:
    return f"{table.title}: {' · '.join(labels.values())}"


def _check_labels(table: Ablation | EfficiencyTable, labels: set[str], recipe: str) -> None:
    """SpecError where an expectation, or a comparison, names a row that is not in the table."""
    for label in (label for expectation in table.expect for label in expectation.order):
        if label not in labels:
            raise SpecError(
                f"ablation {recipe!r} expects something of {label!r}, which is no row; {nearest(label, labels)}"
            )
    first = next(iter(table.axes.values()))
    if isinstance(table, EfficiencyTable) and table.over not in (None, "before", *map(str, first)):
        near = nearest(str(table.over), first)
        raise SpecError(f"ablation {recipe!r} compares with {table.over!r}, which is no row; {near}")
