"""Tests of papers' claims on a table: an order of rows is reproduced, not reproduced or not significant."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

from sana_lab.config.schema import Expectation
from sana_lab.report.columns import column, is_count
from sana_lab.report.significance import Error, error
from sana_lab.report.table import Cell, Row

Outcome = Literal["reproduced", "not reproduced", "not significant", "not measured"]


class Verdict(NamedTuple):
    """The outcome of a claim for one pair of its order."""

    better: str
    worse: str
    metric: str  # that was tested
    outcome: Outcome
    why: str
    claimed: str  # the claim's own metric

    def __str__(self) -> str:
        what = f"{self.better!r} better than {self.worse!r} in {column(self.metric).heading}"
        return f"Expected: {what}. {self.outcome.capitalize()}: {self.why}."


def verdicts(rows: Sequence[Row], expected: Sequence[Expectation], stand_in: Mapping[str, str]) -> list[Verdict]:
    """A verdict on each pair of neighbours of each order, using the metric's stand-in if it has one.

    ValueError for a metric without a better direction.
    """
    by_label = {row.label: row for row in rows}
    pairs = [(e, a, b) for e in expected for a, b in pairwise(e.order)]
    return [_verdict(by_label[a], by_label[b], stand_in.get(e.metric, e.metric), e.metric) for e, a, b in pairs]


def outcome_of(better: Cell, worse: Cell, metric: str) -> tuple[Outcome, str]:
    """The outcome of one pair; the difference (positive is better) with its 95 % interval, its p value, and the true
    difference that this table would have shown in 80 % of repetitions."""
    difference = _direction(metric) * (better.mean - worse.mean)
    spread = Error(0.0, math.inf) if is_count(metric) else error(better, worse)
    if spread is None:
        return "not significant", f"a difference of {difference:+.3g}, but one seed and no interval"
    why = f"difference {difference:+.3g}, " + ("counted" if is_count(metric) else _test(difference, spread))
    if abs(difference) <= spread.half_width:
        return "not significant", why
    return ("reproduced" if difference > 0 else "not reproduced"), why


def _test(difference: float, spread: Error) -> str:
    low, high, p = difference - spread.half_width, difference + spread.half_width, spread.p_value(difference)
    probability = "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
    return (
        f"95 % interval {low:.3g} to {high:.3g}, {probability}; "
        f"a difference of {spread.detectable:.2g} would be seen in 80 % of repetitions"
    )


def _verdict(better: Row, worse: Row, metric: str, claimed: str) -> Verdict:
    cells = [row.cells.get(metric) for row in (better, worse)]
    if cells[0] is None or cells[1] is None:
        missing = " and ".join(repr(r.label) for r, c in zip((better, worse), cells, strict=True) if c is None)
        return Verdict(better.label, worse.label, metric, "not measured", f"nothing of {missing}", claimed)
    return Verdict(better.label, worse.label, metric, *outcome_of(cells[0], cells[1], metric), claimed)


def _direction(metric: str) -> int:
    better = column(metric).better
    if better is None:
        raise ValueError(f"an order is expected in {metric!r}, of which neither more nor less is better")
    return 1 if better == "higher" else -1
