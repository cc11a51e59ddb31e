"""Command `table A B`: rows of several sweeps in one table, with a mark on numbers that are not comparable."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from sana_lab.ablation import generations, plan, report_page
from sana_lab.ablation.record import TrialRecord
from sana_lab.ablation.search.proposals import with_proposals
from sana_lab.ablation.trials import as_timed
from sana_lab.checkpoints import weights
from sana_lab.config import experiments
from sana_lab.config.paths import check_folder
from sana_lab.config.specs import SpecError
from sana_lab.evaluation import report_files
from sana_lab.evaluation.compare import differing
from sana_lab.report import page, render, significance
from sana_lab.report.columns import column, cost_of, is_count, is_quality
from sana_lab.report.table import Row, Table, build_table
from sana_lab.tracking.store import Store
from sana_lab.types import Json

MARK = "†"
"""Beside a number that was not measured as that of the first row."""

TIMED = frozenset({"s", "ms", "img/s", "/s", "MiB", "GiB", "J"})
"""Units of what depends on the machine."""


class Sweep(NamedTuple):
    """An ablation with its trials."""

    name: str
    table: Any  # its options
    trials: Sequence[TrialRecord]


def main(recipes: Sequence[str], overrides: Sequence[str], scale: str | None, retrain: bool, out: Path | None) -> None:
    """Write the table of these ablations, the first being the reference, and print it. SpecError if nothing that they
    measured is comparable, or for one without finished trials."""
    plans = [plan.load(recipe, overrides, scale, retrain=retrain) for recipe in recipes]
    names = [each.name for each in plans]
    if len({type(each.table) for each in plans}) > 1:
        raise SpecError(f"{' and '.join(names)} are of two kinds, quality and efficiency, which have no table together")
    folder = out or weights.HOME / "tables" / "+".join(name.replace("/", "-") for name in names)
    check_folder(folder)
    store = Store(weights.HOME)
    plans = [as_timed(store, with_proposals(store, each)) for each in plans]
    sweeps = [Sweep(each.name, each.table, generations.refresh(store, each)) for each in plans]
    table = build(store, sweeps)
    pictures = plot(table, folder)
    records = [record for sweep in sweeps for record in relabelled(sweep)]
    outcomes = [each for r in firsts(records) if (each := report_page.outcomes(store, r)) is not None]
    content = page.Content(" ".join(filter(None, (each.table.question for each in plans))) or None)
    content = replace(content, outcomes=outcomes, runs=list(report_page.lines(records)))
    paths = [*render.write(table, folder), *pictures, page.write(table, pictures, folder, content)]
    print(render.to_markdown(table))
    print("\n".join(map(str, paths)))


def build(store: Store, sweeps: Sequence[Sweep]) -> Table:
    """The table. SpecError as for `main`."""
    for sweep in sweeps:
        if not any(record.done for record in sweep.trials):
            raise SpecError(f"{sweep.name} has no finished trial; run: sana-lab ablate {sweep.name}")
    records = [record for sweep in sweeps for record in relabelled(sweep) if not record.pruned]
    names = list(dict.fromkeys(name for sweep in sweeps for name in sweep.table.columns))
    table = build_table(
        [record.for_table() for record in records], title=" and ".join(s.table.title for s in sweeps), columns=names
    )
    reports = {r.trial.label: report_of(store, r) for r in firsts(records)}
    facts = {r.trial.label: conditions(r, reports[r.trial.label]) for r in firsts(records)}
    reasons = incomparable(table, facts)
    check_comparable(table, sweeps, reasons)
    marks = significance.marked(significance.differences(table.rows, reports, table.rows[0].label))
    for label, faults in reasons.items():
        odd = {name: {"mark": MARK, "reasons": lines} for name, lines in faults.items()}
        marks[label] = {**marks.get(label, {}), **odd}
    shown = {name for faults in reasons.values() for name in faults}
    columns = [replace(c, better=None) if c.name in shown and not is_count(c.name) else c for c in table.columns]
    baseline = f"▲ better, ▼ worse than {table.rows[0].label!r} at the 5 % level."
    lines = [baseline, *notes(reasons), *table.notes]
    return replace(table, columns=columns, differences=marks, notes=lines)


def relabelled(sweep: Sweep) -> Iterator[TrialRecord]:
    """The trials with the sweep as a label before the others."""
    for record in sweep.trials:
        labels = {"sweep": sweep.name, "row": record.trial.label}
        yield record._replace(trial=record.trial._replace(labels=labels))


def firsts(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The first finished trial of each row."""
    rows: dict[str, TrialRecord] = {}
    for record in records:
        if record.done:
            rows.setdefault(record.trial.label, record)
    return list(rows.values())


def report_of(store: Store, record: TrialRecord) -> Json:
    """The evaluation's report of a run; empty if it has none."""
    with contextlib.suppress(FileNotFoundError):
        report: Json = report_files.read(store, record.run_id)
        return report
    return {}


def conditions(record: TrialRecord, report: Json) -> dict[str, Json]:
    """Under which a row's numbers were measured: `machine` and `size` of costs, and by column those of quality."""
    assert record.run is not None
    tags, config = record.run.tags, record.trial.config
    device = tags.get("device", "cpu")
    machine = f"{tags.get('cores')} x {tags.get('cpu')}" if device == "cpu" else device
    facts: dict[str, Json] = {"machine": {"hardware": machine}}
    if record.trial.kind == "quality":
        size = experiments.image_size(config["data"])
        facts["size"] = {"resolution": config["eval"]["bench_size"] or size, "batch": config["eval"]["bench_batch"]}
        for measure in report.get("measures", {}).values():
            for name in measure["values"]:
                prompts = report.get("per_image", {}).get(name, {}).get("drawn")
                facts[name] = {"resolution": size, "prompts and noise": prompts, **measure.get("settings", {})}
    return facts


def incomparable(table: Table, facts: Mapping[str, Mapping[str, Json]]) -> dict[str, dict[str, list[str]]]:
    """row -> column -> why its number is not comparable with the first row that has one."""
    reasons: dict[str, dict[str, list[str]]] = {}
    for each in table.columns:
        rows = [row for row in table.rows if each.name in row.cells and row.label in facts]
        for row in rows[1:]:
            if lines := differences(each.name, facts[rows[0].label], facts[row.label], rows[0], row):
                reasons.setdefault(row.label, {})[each.name] = lines
    return reasons


def differences(name: str, base: Mapping[str, Json], own: Mapping[str, Json], first: Row, row: Row) -> list[str]:
    """Differences in how a column was measured in two rows; none for counts of equal size."""
    if name in base or name in own:
        return differing(base.get(name, {}), own.get(name, {}))
    if is_quality(name, {f"{name}_low"}) or (column(name).unit not in TIMED and not is_count(name)):
        return []
    sizes = differing(base.get("size", {}), own.get("size", {})) if name != "train_s" and "params" not in name else []
    return sizes + (differing(base["machine"], own["machine"]) if column(name).unit in TIMED else [])


def check_comparable(table: Table, sweeps: Sequence[Sweep], reasons: Mapping[str, Mapping[str, Any]]) -> None:
    """SpecError for a sweep of which no number is comparable with one of the first."""
    rows = {sweep.name: [row for row in table.rows if row.labels["sweep"] == sweep.name] for sweep in sweeps}
    first, *others = sweeps
    ours = {name for row in rows[first.name] for name in row.cells}
    shown = {c.name for c in table.columns} & ours
    for sweep in others:
        theirs = [(row, name) for row in rows[sweep.name] for name in row.cells if name in shown]
        if not [name for row, name in theirs if name not in reasons.get(row.label, {})]:
            lines = [line for row, name in theirs for line in reasons.get(row.label, {}).get(name, [])]
            why = "; ".join(list(dict.fromkeys(lines))[:4]) or "they share no column"
            raise SpecError(f"nothing of {sweep.name!r} is comparable with {first.name!r}: {why}")


def notes(reasons: Mapping[str, Mapping[str, Sequence[str]]]) -> list[str]:
    """A line for each reason with the columns and rows that it marks."""
    marked: dict[str, dict[str, dict[str, None]]] = {}
    for label, columns in reasons.items():
        for name, lines in columns.items():
            marked.setdefault("; ".join(lines), {}).setdefault(column(name).heading, {})[label] = None
    return [
        f"{MARK} not comparable, no best is marked: {', '.join(heads)} of "
        f"{', '.join(dict.fromkeys(repr(label) for rows in heads.values() for label in rows))}: {why}."
        for why, heads in marked.items()
    ]


def plot(table: Table, folder: Path) -> list[Path]:
    """Quality of all rows, and over cost, for columns without marks."""
    from sana_lab.report import plots  # matplotlib takes half a second to import

    marked = {name for cells in table.differences.values() for name, cell in cells.items() if cell["mark"] == MARK}
    measured = {name for row in table.rows for name in row.cells} - marked
    names = [c.name for c in table.columns if c.name in measured and is_quality(c.name, measured)]
    cost = cost_of([c.name for c in table.columns], measured)
    paths = []
    for name in names[:3]:
        paths += [plots.quality(table, name, folder / f"{name}.png")]
        if cost:
            paths += [plots.tradeoff(table, cost, name, folder / f"{name}_{cost}.png")]
    return paths
