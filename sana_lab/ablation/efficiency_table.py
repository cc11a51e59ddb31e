"""From the rows of an efficiency table to its Markdown, with what was counted, what was timed, and what was not."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, cast

from sana_lab import environment
from sana_lab.ablation import results
from sana_lab.ablation.efficiency_spec import Speed
from sana_lab.ablation.trials import Item
from sana_lab.bench.probes import Probe
from sana_lab.config import experiments, specs
from sana_lab.costs.flops import DEFINITION, PAIR
from sana_lab.costs.timing import enough_for
from sana_lab.report import efficiency_plots, render
from sana_lab.report.claims import verdicts
from sana_lab.report.table import Table, build_table, load_published
from sana_lab.types import Json

TIMED = ("latency_s", "images_per_s", "text_s")
"""Of these at least one is there where a row was timed."""


class Conditions(NamedTuple):
    """Under which rows were run."""

    device: str | None  # None: counted alone
    dtypes: Sequence[str]
    unmeasured: Mapping[str, str]  # row -> why it could not be timed


def write(speed: Speed, items: Sequence[Item], conditions: Conditions, folder: Path) -> None:
    """table.{md,tex,csv,json} and the plot in `folder`; prints the Markdown."""
    table = tabulate(speed, [results.record(i) for i in items], conditions, inside_of(items))
    paths = render.write(table, folder)
    paths += draw(speed, table, folder)
    print(render.to_markdown(table))
    print("\n".join(str(path) for path in paths))


def tabulate(speed: Speed, records: Sequence[Json], conditions: Conditions, inside: Sequence[str] = ()) -> Table:
    """The table; numbers that a clock did not give are not in it, and its notes say so."""
    published = load_published(experiments.locate("eval/published", speed.published)) if speed.published else None
    compared = compare(speed, records)
    table = build_table(
        compared,
        title=speed.title,
        columns=speed.columns,
        notes=[
            *_held(speed, compared),
            *_crossings(speed, compared),
            *speed.notes,
            *_counted(speed),
            *_timed(speed, conditions, inside),
        ],
        machine=conditions.device or f"{environment.cores()} x {environment.cpu_model()}",
        published=published,
    )
    if speed.plot == "crossing":  # rows are sizes, among which none is best
        return replace(table, columns=[replace(c, better=None) for c in table.columns])
    return table


def compare(speed: Speed, records: Sequence[Json]) -> list[Json]:
    """The records with `speedup` and `fewer_macs` over the row that each is compared with, where both have numbers."""
    found = []
    for record in records:
        base = _base(speed, records, record)
        ratios = {} if base is None else _ratios(speed.of, base["metrics"], record["metrics"])
        found.append({**record, "metrics": {**record["metrics"], **ratios}})
    return found


def inside_of(items: Sequence[Item]) -> list[str]:
    """What is within the timers of these rows' probes."""
    names = dict.fromkeys(i.trial.experiment["probe"]["name"] for i in items)
    return [f"{name}: {cast('type[Probe]', specs.find('probe', name)).inside}" for name in names]


def draw(speed: Speed, table: Table, folder: Path) -> list[Path]:
    """The plot that the table asks for: of latency where there is one, else of MACs."""
    measured = {name for row in table.rows for name in row.cells}
    if speed.plot == "walk":
        metric = "latency_s" if "latency_s" in measured else "tmacs_image"
        return [efficiency_plots.walk(table, metric, folder / f"walk_{metric}.png")]
    if speed.plot == "crossing" and (names := _pair(table)):
        return [efficiency_plots.crossings(table, names, folder / "crossing.png")]
    return []


def _base(speed: Speed, records: Sequence[Json], record: Json) -> Json | None:
    axis = next(iter(speed.axes))
    if speed.over is None:
        return None
    peers = [r for r in records if {**r["labels"], axis: ""} == {**record["labels"], axis: ""}]
    if speed.over != "before":
        return next((r for r in peers if r["labels"][axis] == speed.over), None)
    place = peers.index(record)
    return peers[place - 1] if place else None


def _ratios(of: str, base: Json, mine: Json) -> Json:
    """How many times better: of throughput mine over theirs, of costs theirs over mine."""
    pairs: dict[str, tuple[str, Callable[[float, float], float]]] = {
        "speedup": (of, (lambda a, b: b / a) if of == "images_per_s" else (lambda a, b: a / b)),
        "fewer_macs": ("tmacs_image", lambda a, b: a / b),
    }
    return {name: how(base[m], mine[m]) for name, (m, how) in pairs.items() if m in base and m in mine}


def _held(speed: Speed, records: Sequence[Json]) -> list[str]:
    rows = build_table(records, title=speed.title).rows
    return [str(v) for v in verdicts(rows, speed.expect, {})]


def _pair(table: Table) -> tuple[str, str] | None:
    """The two that were compared, where any was timed."""
    ending = "_core_ms"
    names = [
        n.removesuffix(ending) for n in dict.fromkeys(n for r in table.rows for n in r.cells) if n.endswith(ending)
    ]
    return (names[0], names[1]) if len(names) == 2 else None


def _crossings(speed: Speed, records: Sequence[Json]) -> list[str]:
    """Where each scope's ratio passes 1, and which ratios a busy machine has not allowed."""
    table = build_table(records, title=speed.title)
    names = _pair(table)
    if speed.plot != "crossing" or names is None:
        return []
    lines = []
    for scope, words in efficiency_plots.SCOPES.items():
        found = efficiency_plots.crossing_of(table.rows, scope)
        lost = [r.label for r in table.rows if f"{scope}_noise" in r.cells and f"{scope}_ratio" not in r.cells]
        lines += [f"{names[1]} becomes faster than {names[0]}, {words}: {found}."] if found else []
        lines += (
            [f"No ratio, for {names[0]} differs from itself by more than 5 %, {words}: {', '.join(lost)}."]
            if lost
            else []
        )
    return lines


def _counted(speed: Speed) -> list[str]:
    pair = [f"MACs of a guided pair: {PAIR}."] if "tmacs_pair" in speed.columns else []
    what = "Parameters, tokens and MACs are counted from shapes on the meta device, at the row's own size"
    forward = "of a forward: one row, without guidance; of an image: text, every forward with guidance, decoding"
    return [*pair, f"{what}; {forward}. {DEFINITION[0].upper()}{DEFINITION[1:]}."]


def _timed(speed: Speed, conditions: Conditions, inside: Sequence[str]) -> list[str]:
    if conditions.device is None:
        toy = "; `--scale toy` times small ones here" if "toy" in speed.scales else ""
        return [
            "Latency, throughput and memory are NOT MEASURED: rows of this size are timed on a CUDA device, and there "
            f"is none here{toy}."
        ]
    lost = [f"Not measured: {label}: {why}." for label, why in conditions.unmeasured.items()]
    bounds = "its 95 % interval" if speed.repeats >= enough_for(0.5) else "the extremes"
    how = f"median of {speed.repeats} calls after {speed.warmup} to warm up, {bounds} in brackets"
    what = f"Timed on {conditions.device}, {' and '.join(conditions.dtypes)}, weights drawn at random: {how}"
    return [f"{what}. Inside the timer: {'; '.join(inside)}.", *lost]
