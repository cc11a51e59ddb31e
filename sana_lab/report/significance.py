"""Marks of a table: bold for the best of a column, ▲ ▼ ≠ for significant differences from the baseline.

With one seed the test is paired: a t test of the mean of per-image differences between row and baseline, clustered by
prompt. It shows whether these two trained models differ, not whether other training seeds would. With several seeds it
is Welch's t test over the seeds' values. Both are two-sided, at the 5 % level, without correction for multiple
comparisons.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import scipy  # its parts are imported when they are first used: stats takes a second

from sana_lab.config.specs import SpecError, nearest
from sana_lab.intervals import clustered_mean
from sana_lab.report.columns import Column, column, is_count
from sana_lab.report.table import TIER, Cell, Row
from sana_lab.types import Json

PAIRED = "paired t test over prompts, same noise"
PAIRED_PICTURES = "paired t test over prompts"
SEEDS = "Welch's t test over seeds"

FROM_FOLDER = "folder:"
"""Beginning of `drawn` of pictures that come from a folder, whose noise is not known."""


class Difference(NamedTuple):
    """Row minus baseline, with the 95 % interval."""

    value: float
    low: float
    high: float
    test: str

    @property
    def significant(self) -> bool:
        return not self.low <= 0 <= self.high


def best(rows: Sequence[Row], column: Column) -> frozenset[int]:
    """Indices of the rows to print in bold: the best mean as displayed, including ties; empty if the column has no
    better direction or all rows are equal. Where rows have tiers, the exact ones alone compete."""
    ranked = {i: row for i, row in enumerate(rows) if row.labels.get(TIER, "exact") == "exact"}
    means = {i: row.cells[column.name].mean for i, row in ranked.items() if column.name in row.cells}
    texts = {i: column.text(mean) for i, mean in means.items()}
    if column.better is None or len(set(texts.values())) < 2:
        return frozenset()
    top = column.text(max(means.values()) if column.better == "higher" else min(means.values()))
    return frozenset(i for i, text in texts.items() if text == top)


def mark(name: str, difference: Difference) -> str:
    """▲ better, ▼ worse, ≠ different without a better direction; empty if not significant."""
    better = column(name).better
    if is_count(name) or not difference.significant:
        return ""
    if better is None:
        return "≠"
    return "▲" if (difference.value > 0) == (better == "higher") else "▼"


def differences(rows: Sequence[Row], reports: Mapping[str, Json], baseline: str) -> dict[str, dict[str, Difference]]:
    """row -> column -> testable difference from the baseline. SpecError if there is no such row.

    `reports` maps labels to the evaluation report of the row's first seed.
    """
    by_label = {row.label: row for row in rows}
    if baseline not in by_label:
        raise SpecError(f"the baseline is {baseline!r}, which is no row; {nearest(baseline, by_label)}")
    return {r.label: _row(r, by_label[baseline], reports) for r in rows if r.label != baseline}


def marked(tests: Mapping[str, Mapping[str, Difference]]) -> dict[str, dict[str, Json]]:
    """The differences as plain data, each with its mark."""
    return {
        label: {name: {**d._asdict(), "mark": mark(name, d)} for name, d in row.items()} for label, row in tests.items()
    }


def note(tests: Mapping[str, Mapping[str, Difference]], baseline: str) -> list[str]:
    """The line under a table that explains its marks; empty if nothing was tested."""
    names = dict.fromkeys(d.test for row in tests.values() for d in row.values())
    if not names:
        return []
    return [f"▲ better, ▼ worse than {baseline!r} at the 5 % level, each by itself: {', '.join(names)}."]


class Error(NamedTuple):
    """Standard error of a difference of two means, and the degrees of freedom of its t test."""

    error: float
    freedom: float

    @property
    def half_width(self) -> float:
        """Half of the 95 % interval, which is the smallest significant difference."""
        return self._quantile(0.975) * self.error if self.error else 0.0

    @property
    def detectable(self) -> float:
        """The smallest true difference that a test at the 5 % level shows in 80 % of repetitions."""
        return (self._quantile(0.975) + self._quantile(0.8)) * self.error if self.error else 0.0

    def p_value(self, difference: float) -> float:
        """Two-sided p value of a difference."""
        if not self.error:
            return 1.0 if difference == 0 else 0.0
        return float(2 * scipy.stats.t.sf(abs(difference) / self.error, self.freedom))

    def _quantile(self, share: float) -> float:
        return float(scipy.stats.t.ppf(share, self.freedom))


def error(a: Cell, b: Cell) -> Error | None:
    """The error of a difference of two means.

    Over seeds if both have several (Welch), else from both intervals as if independent, which is conservative for rows
    that share prompts and noise; None if neither is known.
    """
    if a.std is not None and b.std is not None:
        return _welch(a.std**2 / a.n, b.std**2 / b.n, a.n, b.n)
    if a.interval is None or b.interval is None:
        return None
    half = math.hypot(*((high - low) / 2 for low, high in (a.interval, b.interval)))
    return Error(half / float(scipy.stats.norm.ppf(0.975)), math.inf)


def paired(report: Json, base: Json, name: str) -> Difference | None:
    """Paired test of one column's per-image values in two reports; None unless they share prompts and noise."""
    ours, theirs = (r.get("per_image", {}).get(name) for r in (report, base))
    if not ours or not theirs or ours["drawn"] != theirs["drawn"] or len(ours["values"]) != len(theirs["values"]):
        return None
    changes = [a - b for a, b in zip(ours["values"], theirs["values"], strict=True)]
    mean = clustered_mean(changes, [i // ours["images_per_prompt"] for i in range(len(changes))])
    test = PAIRED_PICTURES if str(ours["drawn"]).startswith(FROM_FOLDER) else PAIRED
    return None if mean.low is None or mean.high is None else Difference(mean.value, mean.low, mean.high, test)


def _row(row: Row, base: Row, reports: Mapping[str, Json]) -> dict[str, Difference]:
    tests = {name: _cell(name, row, base, reports) for name in row.cells if name in base.cells}
    return {name: difference for name, difference in tests.items() if difference}


def _cell(name: str, row: Row, base: Row, reports: Mapping[str, Json]) -> Difference | None:
    a, b = row.cells[name], base.cells[name]
    if is_count(name):
        return None
    if a.std is not None and b.std is not None:
        spread, value = error(a, b), a.mean - b.mean
        return spread and Difference(value, value - spread.half_width, value + spread.half_width, SEEDS)
    if row.label not in reports or base.label not in reports:
        return None
    return paired(reports[row.label], reports[base.label], name)


def _welch(a: float, b: float, na: int, nb: int) -> Error:
    """Welch's error, from the squared standard errors of two means and their numbers of seeds. SciPy's `ttest_ind`
    needs the values, but cells keep only mean and deviation."""
    if a + b == 0:
        return Error(0.0, math.inf)
    return Error(math.sqrt(a + b), (a + b) ** 2 / (a**2 / (na - 1) + b**2 / (nb - 1)))
