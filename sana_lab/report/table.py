"""Tables: trials grouped over seeds, with the definition and origin of each number.

A *record* is one trial as plain data: {"label", "labels": {axis: label}, "seed", "status": finished | failed | missing,
"error", "metrics": {name: number}, "run_id", "commit"}. A metric `x` may have the ends of its 95 % interval, `x_low`
and `x_high`. Records with the same label form one row: their mean and, over several seeds, their spread.
"""

import io
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Literal, NamedTuple

from omegaconf import OmegaConf

from sana_lab.config import text_files
from sana_lab.report.columns import COLUMNS, ENDS, Column, column

FEW_SEEDS = 3
"""Seeds below which a table says that they are few: Student's quantile is 12.7 with two."""

Record = Mapping[str, Any]
Status = Literal["finished", "failed", "missing", "published"]


TIER = "tier"
"""Label of a row that is exact or an approximation, where a table has both."""


class Cell(NamedTuple):
    """One metric of one row."""

    mean: float
    std: float | None  # sample standard deviation over seeds; None for one seed
    interval: tuple[float, float] | None  # 95 %, over prompts or images; its ends are averaged over seeds
    n: int  # seeds
    run_ids: tuple[str, ...]


class Row(NamedTuple):
    """One setting: its cells, and the errors of its unfinished trials."""

    label: str
    labels: dict[str, str]  # axis -> label
    cells: dict[str, Cell]  # by metric; one that was not measured is absent
    status: Status
    seeds: tuple[int, ...]  # that finished
    errors: tuple[str, ...] = ()
    commits: tuple[str, ...] = ()


class Published(NamedTuple):
    """Published numbers, shown beside ours and never mixed with them."""

    title: str
    source: str
    rows: list[Row]
    notes: tuple[str, ...] = ()  # conditions and caveats

    def cell(self, label: str, metric: str) -> Cell | None:
        """The published number of the row with that label."""
        return next((row.cells.get(metric) for row in self.rows if row.label == label), None)


@dataclass(frozen=True)
class Table:
    """Content of a table, independent of the output format."""

    title: str
    axes: list[str]
    columns: list[Column]
    rows: list[Row]
    notes: list[str]
    published: Published | None = None
    differences: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    """row -> column -> tested difference from the baseline: value, low, high, test, mark"""
    verdicts: Sequence[Mapping[str, Any]] = ()
    """tested claims: better, worse, metric, outcome, why, claimed (the claim's own metric)"""


def build_table(
    records: Sequence[Record],
    *,
    title: str,
    columns: Sequence[str] = (),
    notes: Sequence[str] = (),
    machine: str | None = None,
    published: Published | None = None,
    day: date | None = None,
) -> Table:
    """Group records by label, in the order they come, over seeds.

    `columns` names metrics in display order, or is empty for all; a metric that no row has is omitted with a note.
    `notes` define the numbers (bench size, prompts, how MACs and latency are measured); seeds, commits, machine and
    today's date are added. ValueError without records.
    """
    if not records:
        raise ValueError(f"table {title!r} has no records: expected one for each trial, finished or not")
    rows = [_row(group) for group in _groups(records).values()]
    present, absent = choose(columns, rows)
    axes = list(dict.fromkeys(axis for row in rows for axis in row.labels)) or ["label"]
    origin = " on ".join([f"{day or date.today():%Y-%m-%d}"] + ([machine] if machine else []))
    lines = [*_spread_notes(rows, present), *absent, *notes, f"Made {origin}, {_commit_note(rows)}."]
    return Table(title, axes, present, rows, lines, published)


def load_published(path: Path | str) -> Published:
    """Read {title, source, rows: [{label, metric: number, ...}]} from YAML, optionally with `conditions` and `notes`.

    Nothing in it is interpolated. ValueError for an invalid file, naming the problem.
    """
    try:
        data = OmegaConf.to_container(OmegaConf.load(io.StringIO(text_files.read(path))), resolve=False)
    except Exception as error:  # the YAML parser's own classes are many
        raise ValueError(f"{path} cannot be read as YAML: {str(error).strip()}") from error
    if not isinstance(data, dict) or set(data) - {"notes", "conditions"} != {"title", "source", "rows"}:
        raise ValueError(f"{path}: expected the keys title, source and rows, got {data!r:.200}")
    if not isinstance(data["rows"], list):
        raise ValueError(f"{path}: rows is {data['rows']!r:.200}, expected a list of mappings")
    rows = [_published_row(row, path) for row in data["rows"]]
    labels = [row.label for row in rows]
    if twice := [label for label in unique(labels) if labels.count(label) > 1]:
        raise ValueError(f"{path}: {twice[0]!r} is the label of several rows, expected one of each")
    notes = (*([data["conditions"]] if "conditions" in data else []), *(data.get("notes") or []))
    return Published(str(data["title"]), str(data["source"]), rows, tuple(map(str, notes)))


def _published_row(row: Any, path: Path | str) -> Row:
    wrong = "not a mapping" if not isinstance(row, dict) else None if "label" in row else "without a label"
    if wrong:
        raise ValueError(f"{path}: a row is {wrong}: {row!r:.200}")
    numbers = {k: v for k, v in row.items() if k != "label"}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{path}: {name} of {row['label']!r} is {value!r}, expected a number")
    cells = {k: Cell(float(v), None, None, 1, ()) for k, v in numbers.items()}
    return Row(str(row["label"]), {}, cells, "published", ())


def _groups(records: Sequence[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record["label"], []).append(record)
    return groups


def _row(records: list[Record]) -> Row:
    first = records[0]
    finished = [r for r in records if r["status"] == "finished"]
    names = dict.fromkeys(name for r in finished for name in r["metrics"] if not name.endswith(ENDS))
    cells = {name: cell for name in names if (cell := _cell(name, finished))}
    status: Status = (
        "finished" if finished else "failed" if any(r["status"] == "failed" for r in records) else "missing"
    )
    errors = tuple(_error(r) for r in records if r["status"] != "finished")
    commits = unique(r["commit"] for r in finished if r.get("commit"))
    seeds = tuple(sorted(r["seed"] for r in finished))
    return Row(first["label"], dict(first.get("labels") or {}), cells, status, seeds, errors, commits)


def _cell(name: str, records: list[Record]) -> Cell | None:
    having = [r for r in records if _is_number(r["metrics"].get(name))]
    if not having:
        return None
    values = [float(r["metrics"][name]) for r in having]
    std = statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None
    runs = tuple(r["run_id"] for r in having if r.get("run_id"))
    return Cell(math.fsum(values) / len(values), std, _interval(name, having), len(values), runs)


def _interval(name: str, records: list[Record]) -> tuple[float, float] | None:
    ends = [[r["metrics"].get(name + end) for r in records] for end in ENDS]
    if not all(_is_number(value) for end in ends for value in end):
        return None
    return (statistics.fmean(ends[0]), statistics.fmean(ends[1]))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not math.isnan(value)


def _error(record: Record) -> str:
    if record["status"] == "missing":
        return f"{record['label']}, seed {record['seed']}: not run yet"
    lines = str(record.get("error") or "no reason recorded").strip().splitlines()
    return f"{record['label']}, seed {record['seed']} failed: {lines[0][:300]}"


def choose(names: Sequence[str], rows: list[Row]) -> tuple[list[Column], list[str]]:
    """The columns to show, and a note on those that no row has."""
    measured = dict.fromkeys(name for row in rows for name in row.cells)
    order = {c.name: i for i, c in enumerate(COLUMNS)}
    names = list(names) or sorted(measured, key=lambda name: order.get(name, len(order)))
    if not measured:
        return [column(name) for name in names], []
    absent = [column(name).heading for name in names if name not in measured]
    return [column(n) for n in names if n in measured], [f"Not measured: {', '.join(absent)}."] if absent else []


def _spread_notes(rows: list[Row], columns: list[Column]) -> list[str]:
    seeds = unique(row.seeds for row in rows if row.seeds)
    cells = [(c, row.cells[c.name]) for row in rows for c in columns if c.name in row.cells]
    notes = []
    if any(cell.std is not None for _, cell in cells):
        notes.append("Mean ± standard deviation over seeds.")
        if (fewest := min(cell.n for _, cell in cells if cell.std is not None)) < FEW_SEEDS:
            notes.append(f"{fewest} seeds are few: only large differences show.")
    if len(seeds) == 1:
        notes.append(f"{_plural(len(seeds[0]), 'seed')} in each row: {', '.join(map(str, seeds[0]))}.")
    if any(shows_interval(c, cell) for c, cell in cells):
        notes.append("In brackets, the 95 % interval.")
    return [" ".join(notes)] if notes else []


def _commit_note(rows: list[Row]) -> str:
    commits = {commit: [row.label for row in rows if commit in row.commits] for row in rows for commit in row.commits}
    if not commits:
        return "at no known commit"
    if len(commits) == 1:
        return f"at commit {short_commit(next(iter(commits)))}"
    by_row = "; ".join(f"{short_commit(commit)}: {', '.join(labels)}" for commit, labels in commits.items())
    return f"from DIFFERENT commits ({by_row})"


def short_commit(commit: str) -> str:
    """The first ten digits, and any suffix after the forty (such as "-dirty")."""
    return re.sub(r"^([0-9a-f]{10})[0-9a-f]{30}", r"\1", commit)


def shows_interval(column: Column, cell: Cell) -> bool:
    return column.interval and cell.std is None and cell.interval is not None


def _plural(n: int, word: str) -> str:
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def unique(items: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(items))
