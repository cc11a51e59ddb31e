"""The points of an ablation's trainings: curves by row, the speed-up to reach the baseline, notes and plots."""

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from sana_lab.ablation.record import TrialRecord
from sana_lab.config.limits import point_steps
from sana_lab.report.columns import SPEEDUPS, column
from sana_lab.report.learning import NOT_REACHED, Curve, Speedup, Value, speedup
from sana_lab.report.table import Cell, Row, Table
from sana_lab.tracking.store import Store
from sana_lab.types import Json

FILE = "points.json"
"""Artifact of a trial's run: the points of its training."""


class Trainings(NamedTuple):
    """The points of finished trials."""

    rows: Mapping[str, Sequence[Json]]  # label -> the content of FILE for each seed
    lacking: Sequence[str]  # labels of finished rows that ask for points and have none
    steps: Mapping[str, int] = {}  # label -> optimiser steps of a whole training; none where a time ends it

    def curves(self, metric: str) -> dict[str, list[Curve]]:
        """label -> a curve of this metric for each seed that has one."""
        curves: dict[str, list[Curve]] = {}
        for label, files in self.rows.items():
            if seeds := [curve for each in files if (curve := _curve(each, metric))]:
                curves[label] = seeds
        return curves

    def metrics(self) -> set[str]:
        """Columns that have points."""
        return {name for files in self.rows.values() for each in files for p in each["points"] for name in p["values"]}


def collect(store: Store, trials: Iterable[TrialRecord]) -> Trainings:
    """The points of all trials that have finished."""
    rows: dict[str, list[Json]] = {}
    lacking: dict[str, None] = {}
    steps: dict[str, int] = {}
    for record in (r for r in trials if r.done):
        label, trainer = record.trial.label, record.trial.config["trainer"]
        steps |= {} if trainer["max_seconds"] else {label: trainer["max_steps"]}
        with contextlib.suppress(FileNotFoundError):
            rows.setdefault(label, []).append(json.loads(store.file(record.run_id, FILE).read_text()))
            continue
        lacking |= {label: None} if point_steps(record.trial.config) else {}
    return Trainings({label: files for label, files in rows.items() if files}, list(lacking), steps)


def with_speedups(table: Table, trainings: Trainings, baseline: str) -> Table:
    """The table with a column for each of SPEEDUPS, in its leading metric that has points, and notes on them."""
    metric, notes = leading(table, trainings), lacking_note(trainings)
    if metric is None or baseline not in (curves := trainings.curves(metric)):
        return replace(table, notes=[*notes, *table.notes])
    rows, firsts = [], []
    for row in table.rows:
        cells, at_first = _cells(row, curves.get(row.label, []), curves[baseline], metric, row.label == baseline)
        rows.append(row._replace(cells={**row.cells, **cells}))
        firsts += [row.label] if at_first else []
    columns = [c for c in table.columns if c.name not in SPEEDUPS] + [column(name) for name in SPEEDUPS]
    lines = [*notes, *speedup_notes(table, trainings, curves, metric, baseline, firsts)]
    return replace(table, rows=rows, columns=columns, notes=[*lines, *table.notes])


def plot(table: Table, trainings: Trainings, baseline: str, folder: Path) -> list[Path]:
    """A picture of each leading metric over steps, images and seconds."""
    from sana_lab.report import learning_plots  # matplotlib takes half a second to import

    paths: list[Path] = []
    for metric in sorted({m for m in ("exact", "geneval", leading(table, trainings)) if m in trainings.metrics()}):
        assert metric is not None
        curves = {label: trainings.curves(metric).get(label, []) for label in (row.label for row in table.rows)}
        shown = {label: seeds for label, seeds in curves.items() if seeds}
        paths += learning_plots.write(shown, metric, folder, title=table.title, baseline=baseline)
    return paths


def leading(table: Table, trainings: Trainings) -> str | None:
    """The table's first metric that has points and a better direction."""
    measured = trainings.metrics()
    return next((c.name for c in table.columns if c.name in measured and c.better), None)


def speedup_notes(
    table: Table,
    trainings: Trainings,
    curves: Mapping[str, Sequence[Curve]],
    metric: str,
    baseline: str,
    firsts: Sequence[str],
) -> list[str]:
    """What the speed-up is of and how it was computed, and of which rows it is a lower bound."""
    head, ends = column(metric), [curve[-1] for curve in curves[baseline]]
    quality = head.text(sum(value.value for value in ends) / len(ends))
    counts = sorted({len(v.per_image) for seeds in curves.values() for curve in seeds for v in curve if v.per_image})
    images = f" on {' or '.join(map(str, counts))} images a point and seed" if counts else ""
    seeds = "seeds and prompts" if len(ends) > 1 else "prompts (one seed)"
    last, whole = max(value.steps for value in ends), trainings.steps.get(baseline, 0)
    at = "of its end" if last >= whole else f"of its last point (step {last:,} of {whole:,})"
    lines = [
        f"Speed-up to reach the baseline: what {baseline!r} needs for the {head.heading} {at}, "
        f"{quality}{images}, over what the row needs for the same, in optimiser steps and in seconds of training "
        f"steps; linear between points; in brackets the 95 % interval by a bootstrap over {seeds}."
    ]
    if firsts:
        lines.append(f"At least so much, as the first point is already as good: {', '.join(map(repr, firsts))}.")
    shares = [each["share"] for files in trainings.rows.values() for each in files if each.get("share") is not None]
    if shares:
        lines.append(f"Points took {min(shares):.1%} to {max(shares):.1%} of the training's time, which is not in it.")
    return lines


def lacking_note(trainings: Trainings) -> list[str]:
    """The line on finished rows without points."""
    if not trainings.lacking:
        return []
    names = ", ".join(map(repr, trainings.lacking))
    return [f"No points of {names}: trained before they were asked for; a training with another seed measures them."]


def _cells(
    row: Row, curves: Sequence[Curve], base: Sequence[Curve], metric: str, is_baseline: bool
) -> tuple[dict[str, Cell], bool]:
    """The cells of a row, and whether its first point is as good as the baseline's end."""
    if is_baseline:
        return {name: Cell(1.0, None, None, len(base), ()) for name in SPEEDUPS}, False
    better = column(metric).better
    if not curves or better is None:
        return {}, False
    results = {name: speedup(curves, base, axis, better) for name, axis in SPEEDUPS.items()}
    cells = {name: _cell(row, r, len(curves), metric) for name, r in results.items() if r is not None}
    return cells, any(r is not None and r.at_first for r in results.values())


def _cell(row: Row, result: Speedup, seeds: int, metric: str) -> Cell:
    interval = None if result.high == NOT_REACHED else (result.low, result.high)
    runs = row.cells[metric].run_ids if metric in row.cells else ()
    return Cell(result.value, None, interval, seeds, runs)


def _curve(file: Json, metric: str) -> Curve:
    """A metric's values at the points of one training."""
    return [
        Value(p["step"], p["images"], p["seconds"], v["value"], _interval(v), **_per_image(p, metric))
        for p in file["points"]
        if (v := p["values"].get(metric)) is not None
    ]


def _interval(estimate: Json) -> tuple[float, float] | None:
    return None if estimate["low"] is None or estimate["high"] is None else (estimate["low"], estimate["high"])


def _per_image(point: Json, metric: str) -> Json:
    each = point["per_image"].get(metric)
    return (
        {}
        if each is None
        else {k: each[own] for k, own in (("per_image", "values"), ("clusters",) * 2, ("prompt_set", "drawn"))}
    )
