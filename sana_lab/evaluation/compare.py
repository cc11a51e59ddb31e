"""The verb `compare`: differences of two evaluations, paired over images, or the reason why there are none."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import FiniteFloat, PositiveInt, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic reads typing's from Python 3.12 on

from sana_lab.config import text_files
from sana_lab.config.specs import SpecError, nearest
from sana_lab.evaluation.report_files import NUMBERS, is_stored, with_columns
from sana_lab.report.columns import column
from sana_lab.report.significance import Difference, mark, paired
from sana_lab.types import Json

IGNORED = ("features_mib",)
"""Settings that affect no value."""


class Line(NamedTuple):
    """One column of both evaluations."""

    measure: str
    name: str
    a: float
    b: float
    difference: Difference | None  # b less a
    reason: str = ""  # why there is no difference


class _Value(TypedDict):
    """A number; its interval and sample size are not read."""

    value: FiniteFloat


class _Measured(TypedDict):
    """One measure of a report."""

    values: dict[str, _Value]
    settings: Json


_PerImage = TypedDict(  # noqa: UP013 - "drawn" is a key of the file
    "_PerImage", {"values": list[FiniteFloat], "drawn": str | None, "images_per_prompt": PositiveInt}
)
"""One column's numbers per image."""


class _Report(TypedDict):
    """What is read of a report."""

    measures: dict[str, _Measured]
    per_image: dict[str, _PerImage]


def read(path: Path) -> Json:
    """Read a report that `sana-lab eval --json` wrote. SpecError for another file, and for numbers that are none."""
    if path.is_dir():
        words = shlex.join(["sana-lab", "eval", str(path), "eval=SUITE", "--json", f"{path.resolve().name}.json"])
        raise SpecError(f"{str(path)!r} is a folder, expected a file that eval wrote; first evaluate it: {words}")
    if not path.is_file():
        beside = path.parent.glob("*.json") if path.parent.is_dir() else ()
        raise SpecError(f"there is no file {str(path)!r}; {nearest(path.name, (p.name for p in beside))}")
    try:
        report = json.loads(text_files.read(path))
    except (ValueError, RecursionError, OSError) as error:
        raise SpecError(f"{path} is no JSON: {error}") from error
    if not isinstance(report, dict) or not {"measures", "per_image"} <= report.keys():
        raise SpecError(f"{path} holds no evaluation with measures; {_EXPECTED}")
    report = _with_numbers(report, path)
    try:
        TypeAdapter(_Report).validate_python(report)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise SpecError(f"{path}: {where} is {first['input']!r:.60}: {first['msg']}; {_EXPECTED}") from None
    if _depth(report["measures"]) > MAX_DEPTH:
        raise SpecError(f"{path} nests its settings more than {MAX_DEPTH} deep; {_EXPECTED}")
    return report


def _with_numbers(report: Json, path: Path) -> Json:
    """A run's artifact with its numbers per image from the file beside it; another report as it is."""
    columns = report["per_image"]
    if not isinstance(columns, dict) or not any(map(is_stored, columns.values())):
        return report
    file = path.with_name(Path(str(report.pop(NUMBERS, None))).name)
    if not file.is_file():
        raise SpecError(f"{path} has its numbers per image in {file.name}, and there is none beside it; copy both")
    stored = with_columns(columns, file)
    read = {k: {**v, "values": v["values"].read()} if is_stored(columns[k]) else v for k, v in stored.items()}
    return {**report, "per_image": read}


_EXPECTED = "expected what `sana-lab eval NAME --json FILE` writes"

MAX_DEPTH = 50
"""Levels of nested settings; the lab writes fewer than ten."""


def _depth(value: Any) -> int:
    """Levels of nesting, without recursion."""
    depth, level = 0, [value]
    while level:
        depth += 1
        nested = (v for v in level if isinstance(v, dict | list))
        level = [inner for v in nested for inner in (v.values() if isinstance(v, dict) else v)]
    return depth


def compare(a: Json, b: Json) -> list[Line]:
    """Each column that both reports have, in the order of the first. SpecError without common columns."""
    columns = [line for name in a["measures"] if name in b["measures"] for line in _lines(name, a, b)]
    if not columns:
        raise SpecError(f"they share no measure: {_names(a)}, and {_names(b)}")
    return columns


def _names(report: Json) -> str:
    return ", ".join(report["measures"]) or "none"


def _lines(measure: str, a: Json, b: Json) -> Iterator[Line]:
    first, second = a["measures"][measure], b["measures"][measure]
    changes = differing(first["settings"], second["settings"])
    for name in (name for name in first["values"] if name in second["values"]):
        difference = None if changes else paired(b, a, name)
        reason = "; ".join(changes) if changes else "" if difference else _unpaired_reason(a, b, name)
        yield Line(measure, name, first["values"][name]["value"], second["values"][name]["value"], difference, reason)


def _unpaired_reason(a: Json, b: Json, name: str) -> str:
    if name not in a["per_image"] or name not in b["per_image"]:
        return "it has no numbers per image"
    return "other prompts, noise or numbers of images"


def differing(a: Any, b: Any, where: str = "") -> list[str]:
    """Differences between two settings, one line each."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [k for k in {**a, **b} if k not in IGNORED]
        return [line for k in keys for line in differing(a.get(k), b.get(k), f"{where}.{k}".strip("."))]
    return [] if a == b else [f"{where} is {_short(a)} and {_short(b)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 40 else f"{text[:36]} ..."


def lines(columns: list[Line]) -> list[str]:
    """A comparison as text; ▲ and ▼ mark a second that is better or worse at the 5 % level."""
    out = []
    for line in columns:
        head = f"{column(line.name).heading:<28}{line.a:>10.4g}{line.b:>10.4g}"
        if line.difference is None:
            out.append(f"{head}  not compared: {line.reason}")
        else:
            d = line.difference
            out.append(f"{head}{d.value:>+11.4g}  95 % [{d.low:+.4g}, {d.high:+.4g}] {mark(line.name, d)}".rstrip())
    tests = sorted({line.difference.test for line in columns if line.difference})
    return [f"{'':<28}{'first':>10}{'second':>10}{'difference':>11}", *out, *(f"Test: {test}." for test in tests)]


def task_lines(a: Json, b: Json) -> list[str]:
    """The tasks of each score that both reports have, with prompts and images, and those that only one has."""
    out = []
    for key in ("exact", "geneval"):
        tasks = [report.get(key, {}).get("tasks", {}) for report in (a, b)]
        shared = [name for name in tasks[0] if name in tasks[1]]
        counts = [
            f"{sum(t[n]['prompts'] for n in shared)} prompts, {sum(t[n]['images'] for n in shared)} images"
            for t in tasks
        ]
        if shared:
            sizes = counts[0] if counts[0] == counts[1] else f"{counts[0]} and {counts[1]}"
            out.append(f"Tasks of {column(key).heading}: {', '.join(shared)} ({sizes}).")
        for which, own, other in (("first", *tasks), ("second", *reversed(tasks))):
            if tasks[0] and tasks[1] and (only := [name for name in own if name not in other]):
                out.append(f"Only the {which} has {', '.join(only)}; the means over tasks are of other tasks.")
    return out


def main(first: Path, second: Path) -> int:
    """`sana-lab compare A.json B.json`; exit status 1 if no column can be compared."""
    a, b = read(first), read(second)
    columns = compare(a, b)
    print("\n".join([*lines(columns), *task_lines(a, b)]))
    return 0 if any(line.difference for line in columns) else 1
