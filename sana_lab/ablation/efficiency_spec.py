"""Efficiency tables as files: ablations whose rows are probes, counted and timed; nothing trains, nothing is judged.

A file of `ablations/` with a `probe:` is one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

from sana_lab.bench.probes import Probe
from sana_lab.config import ablations, experiments, specs
from sana_lab.config.schema import Config, Expectation, Trial
from sana_lab.config.specs import SpecError


@dataclass
class Speed:
    """`ablations/*.yaml` of an efficiency table: a probe, axes of labelled changes to it, and the table's columns.

    `gpu` says that the rows are too large to be timed without CUDA; there they are counted alone. The column `speedup`
    is of `of`, over the row `over` of the first axis, or over the row before where that says `before`; `fewer_macs`
    likewise. Other keys are those of an ablation.
    """

    title: str
    probe: dict[str, Any]
    axes: dict[str, dict[str, Config | None]]
    columns: list[str]
    gpu: bool = False
    repeats: int = 5
    warmup: int = 1
    over: str | None = None
    of: Literal["images_per_s", "latency_s"] = "images_per_s"
    notes: list[str] = field(default_factory=list)
    published: str | None = None
    expect: list[Expectation] = field(default_factory=list)
    plot: Literal["walk", "crossing"] | None = None
    scales: dict[str, dict[str, Any]] = field(default_factory=dict)


def is_speed(recipe: str) -> bool:
    """Whether an ablation's file is an efficiency table."""
    return "probe" in experiments.read(experiments.locate("ablations", recipe))


def load(recipe: str, overrides: Sequence[str] = (), scale: str | None = None) -> tuple[Speed, list[Trial]]:
    """An efficiency table at a scale, and its rows, each a complete probe; all are checked before the first runs."""
    raw = ablations.at_scale(experiments.read(experiments.locate("ablations", recipe)), scale, recipe)
    checked = specs.complete(specs.fields(Speed), raw, f"ablation {recipe!r}", recipe)
    table = Speed(**{**checked, "expect": [Expectation(**e) for e in checked["expect"]]})
    if not table.axes or not all(table.axes.values()):
        raise SpecError(f"ablation {recipe!r} has no axes with labels; expected axes: {{model: {{a: ..., b: ...}}}}")
    trials = list(_rows(table, overrides))
    ablations.check_order(table.expect, {t.label for t in trials}, recipe)
    _check_over(table, recipe)
    return table, trials


def _rows(table: Speed, overrides: Sequence[str]) -> Iterable[Trial]:
    axes = [[(axis, label, over) for label, over in labels.items()] for axis, labels in table.axes.items()]
    for combination in product(*axes):
        spec = experiments.nest(table.probe)
        for _, _, over in combination:
            spec = experiments.merge(spec, experiments.nest(over or {}))
        labels = {axis: str(label) for axis, label, _ in combination}
        title = f"{table.title}: {' · '.join(labels.values())}"
        resolved = specs.resolve("probe", experiments.apply(spec, overrides), title)
        trial = Trial(labels, 0, {"probe": resolved, "repeats": table.repeats, "warmup": table.warmup})
        probe_of(trial)
        yield trial


def probe_of(trial: Trial) -> Probe:
    """What a row is about; nothing is allocated."""
    return specs.build("probe", trial.experiment["probe"])


def _check_over(table: Speed, recipe: str) -> None:
    first = next(iter(table.axes.values()))
    if table.over not in (None, "before", *map(str, first)):
        near = specs.nearest(str(table.over), first)
        raise SpecError(f"ablation {recipe!r} compares with {table.over!r}, which is no row; {near}")
