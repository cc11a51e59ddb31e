"""Which rows of a table differ from its baseline: paired over images that share prompts and noise, or over seeds.

With one seed the test is paired: the baseline's numbers per image less the row's, in one order, and a t test of their
mean with images of one prompt as one cluster. It says that these two trained models differ, and nothing of what
another training seed would give. With several seeds it is Welch's t test of the seeds' values. Both are two-sided, at
the 5 % level, without correction for the number of rows and columns.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sana_lab.config.specs import SpecError, nearest
from sana_lab.evaluation.per_prompt import clustered_mean
from sana_lab.report.claims import half_width
from sana_lab.report.table import Row, column
from sana_lab.types import Json

PAIRED = "paired t test over prompts, same noise"
SEEDS = "Welch's t test over seeds"


class Difference(NamedTuple):
    """A row less the baseline, with its 95 % interval."""

    value: float
    low: float
    high: float
    test: str

    @property
    def significant(self) -> bool:
        return not self.low <= 0 <= self.high


def differences(rows: Sequence[Row], reports: Mapping[str, Json], baseline: str) -> dict[str, dict[str, Difference]]:
    """row -> column -> its difference from the baseline, where it can be tested. SpecError for no such row.

    `reports` holds what `eval` found of the rows' first seeds, by label.
    """
    found = {row.label: row for row in rows}
    if baseline not in found:
        raise SpecError(f"the baseline is {baseline!r}, which is no row; {nearest(baseline, found)}")
    base = found[baseline]
    return {r.label: _of_row(r, base, reports) for r in rows if r.label != baseline}


def marked(found: Mapping[str, Mapping[str, Difference]]) -> dict[str, dict[str, Json]]:
    """The same as plain data, with the mark that a table shows: ▲ better, ▼ worse, ≠ where neither is better."""
    return {
        label: {name: {**d._asdict(), "mark": mark(name, d)} for name, d in row.items()} for label, row in found.items()
    }


def note(found: Mapping[str, Mapping[str, Difference]], baseline: str) -> list[str]:
    """What the marks say; nothing where nothing was tested."""
    tests = dict.fromkeys(d.test for row in found.values() for d in row.values())
    if not tests:
        return []
    return [f"▲ better, ▼ worse than {baseline!r} at the 5 % level, each by itself: {', '.join(tests)}."]


def mark(name: str, difference: Difference) -> str:
    """▲ better, ▼ worse, ≠ other where neither is better; nothing where it is within the noise."""
    better = column(name).better
    if not difference.significant:
        return ""
    if better is None:
        return "≠"
    return "▲" if (difference.value > 0) == (better == "higher") else "▼"


def _of_row(row: Row, base: Row, reports: Mapping[str, Json]) -> dict[str, Difference]:
    tested = {name: _of_cell(name, row, base, reports) for name in row.cells if name in base.cells}
    return {name: difference for name, difference in tested.items() if difference}


def _of_cell(name: str, row: Row, base: Row, reports: Mapping[str, Json]) -> Difference | None:
    a, b = row.cells[name], base.cells[name]
    if a.std is not None and b.std is not None:
        half, value = half_width(a, b), a.mean - b.mean
        return None if half is None else Difference(value, value - half, value + half, SEEDS)
    if row.label not in reports or base.label not in reports:
        return None
    return paired(reports[row.label], reports[base.label], name)


def paired(report: Json, base: Json, name: str) -> Difference | None:
    """From two reports' numbers per image of one column; None where they are not of the same prompts and noise."""
    ours, theirs = (r.get("per_image", {}).get(name) for r in (report, base))
    if not ours or not theirs or ours["drawn"] != theirs["drawn"] or len(ours["values"]) != len(theirs["values"]):
        return None
    apart = [a - b for a, b in zip(ours["values"], theirs["values"], strict=True)]
    mean = clustered_mean(apart, [i // ours["images_per_prompt"] for i in range(len(apart))])
    return None if mean.low is None or mean.high is None else Difference(mean.value, mean.low, mean.high, PAIRED)
