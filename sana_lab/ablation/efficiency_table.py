"""The table of an ablation of kind efficiency: what was counted, what was timed, and what was not, and its plot."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, cast

from sana_lab import environment
from sana_lab.ablation import efficiency
from sana_lab.ablation.record import TrialRecord, equal_rows
from sana_lab.bench.probes import Probe
from sana_lab.config import experiments, specs
from sana_lab.config.schema import EfficiencyTable
from sana_lab.costs.flops import DEFINITION, PAIR
from sana_lab.costs.timing import samples_needed
from sana_lab.report.claims import verdicts
from sana_lab.report.crossover import SCOPES, crossing_of
from sana_lab.report.table import Table, build_table, load_published
from sana_lab.types import Json

SWEEP_ENDING = "_core_ms"
"""Metrics of an attention sweep that end so begin with the names of the two that it compares."""


class Conditions(NamedTuple):
    """Under which the rows were run."""

    device: str | None  # None: counted only
    dtypes: Sequence[str]
    unmeasured: Mapping[str, str]  # row -> why it could not be timed
    timers: Sequence[str] = ()  # what is inside the timer of each kind of probe
    equal: Sequence[str] = ()  # lines on rows of equal settings
    summaries: Sequence[str] = ()  # how readings become numbers, of probes that say so


def build(options: EfficiencyTable, trials: Sequence[TrialRecord]) -> Table:
    """The table of what has finished on a device such as this machine's."""
    return tabulate(options, [record.for_table() for record in trials], conditions_of(options, trials))


def conditions_of(options: EfficiencyTable, trials: Sequence[TrialRecord]) -> Conditions:
    return Conditions(
        devices_of(options, trials),
        sorted({efficiency.build_probe(record.trial.config).dtype for record in trials}),
        {
            r.trial.label: r.run.tags[efficiency.UNMEASURED]
            for r in trials
            if r.run and efficiency.UNMEASURED in r.run.tags
        },
        [f"{name}: {probe.inside}" for name, probe in probe_classes(trials).items()],
        equal_rows(trials),
        [*dict.fromkeys(probe.summary for probe in probe_classes(trials).values() if probe.summary)],
    )


def devices_of(options: EfficiencyTable, trials: Sequence[TrialRecord]) -> str | None:
    """The devices that timed the rows, by their runs, or this machine's; None if they are only counted."""
    tags = (r.run.tags.get(efficiency.TIMED_ON) for r in trials if r.run)
    target = efficiency.target_of(options, None)
    names = sorted({tag for tag in tags if tag})
    if len(names) > 1:
        return f"{' and '.join(names)} (rows of different devices cannot be compared)"
    return names[0] if names else target.name if target else None


def probe_classes(trials: Sequence[TrialRecord]) -> dict[str, type[Probe]]:
    names = dict.fromkeys(record.trial.config["probe"]["name"] for record in trials)
    return {name: cast("type[Probe]", specs.find("probe", name)) for name in names}


def tabulate(options: EfficiencyTable, records: Sequence[Json], conditions: Conditions) -> Table:
    """The table; numbers that no clock gave are not in it, and its notes say so."""
    compared = compare(options, records)
    table = build_table(
        compared,
        title=options.title,
        columns=options.columns,
        notes=[
            *_claims(options, compared),
            *_crossings(options, compared),
            *options.notes,
            *conditions.equal,
            *_counted(options),
            *_timed(options, conditions),
        ],
        machine=conditions.device or f"{environment.cores()} x {environment.cpu_model()}",
        published=load_published(experiments.locate("eval/published", options.published))
        if options.published
        else None,
    )
    if options.plot == "crossing":  # rows are sizes, among which none is best
        return replace(table, columns=[replace(c, better=None) for c in table.columns])
    return table


def plot(options: EfficiencyTable, table: Table, folder: Path) -> list[Path]:
    """The plot selected by the table's option `plot`: of latency if timed, else of MACs."""
    from sana_lab.report import efficiency_plots  # matplotlib takes half a second to import

    measured = {name for row in table.rows for name in row.cells}
    if options.plot == "walk":
        timed = [name for name in ("latency_s", "blocks_latency_s") if name in measured]
        metric = timed[0] if timed else "tmacs_image"
        return [efficiency_plots.walk(table, metric, folder / f"walk_{metric}.png")]
    if options.plot == "crossing" and (names := _pair(table)):
        return [efficiency_plots.crossings(table, names, folder / "crossing.png")]
    return []


def compare(options: EfficiencyTable, records: Sequence[Json]) -> list[Json]:
    """The records with `speedup` (or `blocks_speedup`) and `fewer_macs` over the row that each is compared with, where
    both have numbers."""
    compared = []
    for record in records:
        base = _base(options, records, record)
        ratios = {} if base is None else _ratios(options.of, base["metrics"], record["metrics"])
        compared.append({**record, "metrics": {**record["metrics"], **ratios}})
    return compared


def _base(options: EfficiencyTable, records: Sequence[Json], record: Json) -> Json | None:
    """The record that one is compared with: of the same labels but on the first axis."""
    axis = next(iter(options.axes))
    if options.over is None:
        return None
    peers = [r for r in records if {**r["labels"], axis: ""} == {**record["labels"], axis: ""}]
    if options.over != "before":
        return next((r for r in peers if r["labels"][axis] == options.over), None)
    place = peers.index(record)
    return peers[place - 1] if place else None


def _ratios(of: str, base: Json, metrics: Json) -> Json:
    """Factor of improvement over the base: throughput over the base's, or the base's cost over this cost."""
    speedup = "blocks_speedup" if of.startswith("blocks_") else "speedup"
    pairs: dict[str, tuple[str, Callable[[float, float], float]]] = {
        speedup: (of, (lambda a, b: b / a) if of == "images_per_s" else (lambda a, b: a / b)),
        "fewer_macs": ("tmacs_image", lambda a, b: a / b),
    }
    return {name: ratio(base[m], metrics[m]) for name, (m, ratio) in pairs.items() if m in base and m in metrics}


def _claims(options: EfficiencyTable, records: Sequence[Json]) -> list[str]:
    rows = build_table(records, title=options.title).rows
    return [str(verdict) for verdict in verdicts(rows, options.expect, {})]


def _pair(table: Table) -> tuple[str, str] | None:
    """The names of the two that a sweep compares, where both were timed."""
    metrics = dict.fromkeys(name for row in table.rows for name in row.cells)
    names = [name.removesuffix(SWEEP_ENDING) for name in metrics if name.endswith(SWEEP_ENDING)]
    return (names[0], names[1]) if len(names) == 2 else None


def _crossings(options: EfficiencyTable, records: Sequence[Json]) -> list[str]:
    """Crossover of each scope, and ratios that are missing because the machine was too noisy."""
    table = build_table(records, title=options.title)
    names = _pair(table)
    if options.plot != "crossing" or names is None:
        return []
    lines = []
    for scope, words in SCOPES.items():
        crossing = crossing_of(table.rows, scope)
        noisy = [r.label for r in table.rows if f"{scope}_noise" in r.cells and f"{scope}_ratio" not in r.cells]
        if crossing:
            lines.append(f"{names[1]} becomes faster than {names[0]}, {words}: {crossing}.")
        if noisy:
            lines.append(f"No ratio, for {names[0]} differs from itself by more than 5 %, {words}: {', '.join(noisy)}.")
    return lines


def _counted(options: EfficiencyTable) -> list[str]:
    pair = [f"MACs of a guided pair: {PAIR}."] if "tmacs_pair" in options.columns else []
    what = "Parameters, tokens and MACs are counted from shapes on the meta device, at the row's own size"
    forward = "of a forward: one row, without guidance; of an image: text, every forward with guidance, decoding"
    return [*pair, f"{what}; {forward}. {DEFINITION[0].upper()}{DEFINITION[1:]}."]


def _timed(options: EfficiencyTable, conditions: Conditions) -> list[str]:
    if conditions.device is None:
        toy = "; `--scale toy` times small ones here" if "toy" in options.scales else ""
        toy += ", `--scale blocks` one block of each kind" if toy and "blocks" in options.scales else ""
        return [
            "Latency, throughput and memory are NOT MEASURED: rows of this size are timed on a CUDA device, and there "
            f"is none here{toy}."
        ]
    missing = [f"Not measured: {label}: {reason}." for label, reason in conditions.unmeasured.items()]
    bounds = "its 95 % interval" if options.repeats >= samples_needed(0.5) else "the extremes"
    repeats = f"median of {options.repeats} calls after {options.warmup} to warm up, {bounds} in brackets"
    how = "; ".join(conditions.summaries) or repeats
    what = f"Timed on {conditions.device}, {' and '.join(conditions.dtypes)}, weights drawn at random: {how}"
    return [f"{what}. Inside the timer: {'; '.join(conditions.timers)}.", *missing]
