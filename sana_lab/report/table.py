"""The table: trials grouped over seeds, with what each number is and where it came from.

A *record* is one trial as plain data: {"label", "labels": {axis: label}, "seed", "status": finished | failed | missing,
"error", "metrics": {name: number}, "run_id", "commit"}. A metric `x` may come with the ends of its 95 % interval,
`x_low` and `x_high`. Records of one label are one row: their mean and, over several seeds, their spread.
"""

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Literal, NamedTuple

from omegaconf import OmegaConf

Record = Mapping[str, Any]
Status = Literal["finished", "failed", "missing", "published"]

ENDS = ("_low", "_high")


@dataclass(frozen=True)
class Column:
    """How a metric is shown."""

    name: str
    heading: str
    unit: str = ""
    better: Literal["higher", "lower"] | None = None
    decimals: int | None = None  # None: three significant digits
    interval: bool = False  # shows the 95 % interval where there is no spread over seeds
    printed: bool = False  # shows six significant digits at most: numbers that others have rounded

    @property
    def title(self) -> str:
        """Heading, unit, and an arrow that points to the better side."""
        arrow = {"higher": " ↑", "lower": " ↓", None: ""}[self.better]
        return self.heading + (f" ({self.unit})" if self.unit else "") + arrow

    def text(self, value: float) -> str:
        if self.printed:
            return f"{value:g}"
        return _significant(value) if self.decimals is None else f"{value:.{self.decimals}f}"


COLUMNS = (
    Column("params_m", "Params", "M"),
    Column("dit_params_m", "DiT params", "M"),
    Column("dit_params_b", "DiT params", "B"),
    Column("text_params_m", "Text params", "M"),
    Column("params_b", "Params", "B"),
    Column("gmacs", "MACs", "G", "lower"),
    Column("tmacs", "MACs of a forward", "T", "lower"),
    Column("tmacs_pair", "MACs of a guided pair", "T", "lower"),
    Column("tmacs_image", "MACs of an image", "T", "lower"),
    Column("text_gmacs", "MACs of a prompt", "G", "lower"),
    Column("fewer_macs", "Fewer MACs", "times"),
    Column("tokens", "Tokens", decimals=0),
    Column("text_tokens", "Text tokens", decimals=0),
    Column("steps", "Steps", decimals=0),
    Column("evaluations", "Forwards", decimals=0),
    Column("latency_s", "Latency", "s", "lower", interval=True),
    Column("latency_ms", "Latency", "ms", "lower"),
    Column("text_s", "Text", "s", "lower"),
    Column("text_ms", "Text", "ms", "lower"),
    Column("denoise_ms", "Denoise", "ms", "lower"),
    Column("decode_ms", "Decode", "ms", "lower"),
    Column("images_per_s", "Throughput", "img/s", "higher"),
    Column("speedup", "Speed-up"),
    Column("peak_mib", "Peak memory", "MiB", "lower", 0),
    Column("peak_gib", "Peak memory", "GiB", "lower", 2),
    Column("reserved_mib", "Reserved memory", "MiB", "lower", 0),
    Column("energy_j", "Energy", "J", "lower"),
    Column("geneval", "GenEval", "", "higher", 2, interval=True),
    Column("geneval_single_object", "Single", "", "higher", 2),
    Column("geneval_two_object", "Two", "", "higher", 2),
    Column("geneval_counting", "Counting", "", "higher", 2),
    Column("geneval_colors", "Colors", "", "higher", 2),
    Column("geneval_position", "Position", "", "higher", 2),
    Column("geneval_color_attr", "Attribution", "", "higher", 2),
    Column("geneval_partial", "GenEval, PARTIAL", "", "higher", 2, interval=True),
    Column("geneval_no_exclude", "GenEval, counting as at least", "", "higher", 2, interval=True),
    Column("geneval_partial_no_exclude", "GenEval, PARTIAL, counting as at least", "", "higher", 2, interval=True),
    Column("geneval_correct_images", "Correct images", "", "higher", 2),
    Column("geneval_correct_prompts", "Correct prompts", "", "higher", 2),
    Column("dpg", "DPG", "", "higher", 1, interval=True),
    Column("dpg_partial", "DPG, PARTIAL", "", "higher", 1, interval=True),
    Column("dpg_global", "Global", "", "higher", 1),
    Column("dpg_entity", "Entity", "", "higher", 1),
    Column("dpg_attribute", "Attribute", "", "higher", 1),
    Column("dpg_relation", "Relation", "", "higher", 1),
    Column("dpg_other", "Other", "", "higher", 1),
    Column("image_reward", "ImageReward", "", "higher", 2, interval=True),
    Column("image_reward_truncated", "Prompts over 35 tokens", "%", None, 1),
    Column("hps", "HPS", "", "higher", 2, interval=True),
    Column("hps_truncated", "Prompts cut for HPS", "%", None, 1),
    Column("clip", "CLIP", "", "higher", 2, interval=True),
    Column("clip_truncated", "Prompts cut for CLIP", "%", None, 1),
    Column("clip_chunks", "CLIP (chunks)", "", "higher", 2, interval=True),
    Column("clip_shapes", "CLIP-shapes", "", "higher", 1, interval=True),
    Column("fid", "FID", "", "lower", 2, interval=True),
    Column("fid_infinity", "FID∞", "", "lower", 2, interval=True),
    Column("fd_shapes", "FD-shapes", "", "lower", 3, interval=True),
    Column("fd_dinov2", "FD-DINOv2", "", "lower", 1, interval=True),
    Column("fd_clip", "FD-CLIP", "", "lower", 2, interval=True),
    Column("kid", "KID", "", "lower", 4, interval=True),
    Column("kd_shapes", "KD-shapes", "", "lower", 4, interval=True),
    Column("cmmd", "CMMD", "", "lower", 3, interval=True),
    Column("cmmd_biased", "CMMD (biased)", "", "lower", 3, interval=True),
    Column("inception_score", "IS", "", "higher", 2, interval=True),
    *(
        Column(f"{name}{of}", name.capitalize(), "", "higher", 2)
        for of in ("", "_dinov2", "_clip", "_shapes")
        for name in ("precision", "recall", "density", "coverage")
    ),
    Column("rfid", "rFID", "", "lower", 2, interval=True),
    Column("psnr", "PSNR", "dB", "higher", 2, interval=True),
    Column("ssim", "SSIM", "", "higher", 3, interval=True),
    Column("lpips", "LPIPS", "", "lower", 3, interval=True),
    Column("val_loss", "Val. loss", "", "lower", 4),
    Column("train_loss", "Train loss", "", "lower", 4),
    Column("train_s", "Training", "s", None, 0),
)
"""What the lab measures, in the order that tables show. A metric that is not here gets a column by its name's end."""

ENDINGS: tuple[tuple[str, str, Literal["higher", "lower"] | None], ...] = (
    ("_per_s", "/s", "higher"),
    ("_ms", "ms", "lower"),
    ("_gmacs", "GMACs", "lower"),
    ("_mib", "MiB", "lower"),
    ("_gib", "GiB", "lower"),
    ("_s", "s", "lower"),
    ("_m", "M", None),
    ("_db", "dB", "higher"),
    ("loss", "", "lower"),
)


class Cell(NamedTuple):
    """One metric of one row."""

    mean: float
    std: float | None  # sample standard deviation over seeds; None for one seed
    interval: tuple[float, float] | None  # 95 %, over prompts or images; its ends are averaged over seeds
    n: int  # seeds
    run_ids: tuple[str, ...]


class Row(NamedTuple):
    """One setting: its cells, and why some of its trials have none."""

    label: str
    labels: dict[str, str]  # axis -> label
    cells: dict[str, Cell]  # a metric that nothing gave is not there
    status: Status
    seeds: tuple[int, ...]  # that finished
    errors: tuple[str, ...] = ()
    commits: tuple[str, ...] = ()


class Published(NamedTuple):
    """Numbers that others measured; shown beside ours, never mixed with them."""

    title: str
    source: str
    rows: list[Row]
    notes: tuple[str, ...] = ()  # under which conditions, and what is odd

    def cell(self, label: str, metric: str) -> Cell | None:
        """What they measured of the row with that label."""
        return next((row.cells.get(metric) for row in self.rows if row.label == label), None)


@dataclass(frozen=True)
class Table:
    """What every format is written from."""

    title: str
    axes: list[str]
    columns: list[Column]
    rows: list[Row]
    notes: list[str]
    published: Published | None = None
    differences: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    """row -> column -> its tested difference from the baseline: value, low, high, test, mark"""

    def best(self, column: Column) -> frozenset[str]:
        """The texts of the best mean among the rows (ties included); empty where nothing is better than the rest."""
        means = [row.cells[column.name].mean for row in self.rows if column.name in row.cells]
        texts = {column.text(mean) for mean in means}
        if column.better is None or len(texts) < 2:
            return frozenset()
        return frozenset({column.text(max(means) if column.better == "higher" else min(means))})


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
    """Groups records by label, in the order they come, over seeds.

    `columns` names metrics in the order to show, all of them when it is empty; one that no row has is left out and
    said so. `notes` state what the numbers mean (bench size, prompts, how MACs and latency are taken); seeds,
    commits, machine and day (today) are added. Raises ValueError for no records.
    """
    if not records:
        raise ValueError(f"table {title!r} has no records: expected one for each trial, finished or not")
    rows = [_row(group) for group in _groups(records).values()]
    shown, absent = choose(columns, rows)
    axes = list(dict.fromkeys(axis for row in rows for axis in row.labels)) or ["label"]
    made = " on ".join([f"{day or date.today():%Y-%m-%d}"] + ([machine] if machine else []))
    lines = [*_spread_notes(rows, shown), *absent, *notes, f"Made {made}, {_commit_note(rows)}."]
    return Table(title, axes, shown, rows, lines, published)


def column(name: str) -> Column:
    """The registered column of a metric, or one made from the end of its name."""
    known = {c.name: c for c in COLUMNS}
    if name in known:
        return known[name]
    for end, unit, better in ENDINGS:
        if name.endswith(end):
            stem = name if end == "loss" else name.removesuffix(end)
            return Column(name, words(stem), unit, better)
    return Column(name, words(name))


def load_published(path: Path | str) -> Published:
    """Reads {title, source, rows: [{label, metric: number, ...}]} from YAML, with `conditions` and `notes` if it likes.

    Raises ValueError naming what is wrong.
    """
    data = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    if not isinstance(data, dict) or set(data) - {"notes", "conditions"} != {"title", "source", "rows"}:
        raise ValueError(f"{path}: expected the keys title, source and rows, got {data!r:.200}")
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
    done = [r for r in records if r["status"] == "finished"]
    names = dict.fromkeys(name for r in done for name in r["metrics"] if not name.endswith(ENDS))
    cells = {name: cell for name in names if (cell := _cell(name, done))}
    status: Status = "finished" if done else "failed" if any(r["status"] == "failed" for r in records) else "missing"
    errors = tuple(_error(r) for r in records if r["status"] != "finished")
    commits = unique(r["commit"] for r in done if r.get("commit"))
    seeds = tuple(sorted(r["seed"] for r in done))
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
    wanted = list(names) or sorted(measured, key=lambda name: order.get(name, len(order)))
    if not measured:
        return [column(name) for name in wanted], []
    absent = [column(name).heading for name in wanted if name not in measured]
    return [column(n) for n in wanted if n in measured], [f"Not measured: {', '.join(absent)}."] if absent else []


def _spread_notes(rows: list[Row], columns: list[Column]) -> list[str]:
    seeds = unique(row.seeds for row in rows if row.seeds)
    cells = [(c, row.cells[c.name]) for row in rows for c in columns if c.name in row.cells]
    notes = []
    if any(cell.std is not None for _, cell in cells):
        notes.append("Mean ± standard deviation over seeds.")
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
    """The first ten digits, and whatever follows the forty (such as "-dirty")."""
    return re.sub(r"^([0-9a-f]{10})[0-9a-f]{30}", r"\1", commit)


def shows_interval(column: Column, cell: Cell) -> bool:
    return column.interval and cell.std is None and cell.interval is not None


def words(name: str) -> str:
    text = name.replace("_", " ").replace("/", " ").strip()
    return text[:1].upper() + text[1:]


def _significant(value: float, digits: int = 3) -> str:
    """Three significant digits without an exponent; whole numbers above that."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    places = digits - 1 - math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    return f"{value:.{max(0, places)}f}"


def _plural(n: int, word: str) -> str:
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def unique(items: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(items))
