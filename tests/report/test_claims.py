"""Orderings of others held against rows of known means, spreads and intervals."""

import math

import numpy as np
import pytest
from scipy import stats

from sana_lab.config.schema import Expectation
from sana_lab.report.claims import outcome_of, verdicts
from sana_lab.report.significance import Error, error
from sana_lab.report.table import Cell, Row


def cell(mean: float, std: float | None = None, interval: tuple[float, float] | None = None, n: int = 1) -> Cell:
    return Cell(mean, std, interval, n, ())


def row(label: str, **cells: Cell) -> Row:
    return Row(label, {"a": label}, cells, "finished", (0,))


def outcome(better: Cell, worse: Cell, metric: str = "geneval") -> str:
    return outcome_of(better, worse, metric)[0]


def test_over_seeds_the_interval_is_welchs():
    a, b = [0.50, 0.54, 0.58], [0.40, 0.41, 0.45, 0.46]
    test = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    ours = error(cell(0, stats.tstd(a), n=3), cell(0, stats.tstd(b), n=4))
    assert ours is not None
    assert ours.half_width == pytest.approx((test.high - test.low) / 2)
    p = stats.ttest_ind(a, b, equal_var=False).pvalue
    assert ours.p_value(sum(a) / 3 - sum(b) / 4) == pytest.approx(p)


def test_the_detectable_difference_is_significant_in_80_percent_of_repetitions():
    freedom, wide = 8, Error(0.1, 8)
    draws = stats.norm.rvs(wide.detectable, 0.1, size=20_000, random_state=0)
    errors = 0.1 * np.sqrt(stats.chi2.rvs(freedom, size=20_000, random_state=1) / freedom)
    significant = np.abs(draws) > stats.t.ppf(0.975, freedom) * errors
    assert significant.mean() == pytest.approx(0.8, abs=0.03)


def test_with_one_seed_the_intervals_of_both_add_as_squares():
    both = error(cell(0.5, interval=(0.44, 0.56)), cell(0.4, interval=(0.32, 0.48)))
    assert both is not None
    assert both.half_width == pytest.approx(math.hypot(0.06, 0.08))
    assert error(cell(0.5, interval=(0.4, 0.6)), cell(0.4)) is None


def test_outcomes_by_the_sign_and_the_interval():
    high, low = cell(0.6, interval=(0.57, 0.63)), cell(0.5, interval=(0.47, 0.53))
    near = cell(0.58, interval=(0.55, 0.61))
    assert outcome(high, low) == "reproduced"
    assert outcome(low, high) == "not reproduced"
    assert outcome(high, near) == outcome(near, high) == "not significant"


def test_less_is_better_where_the_column_says_so():
    assert outcome(cell(6.0, 0.1, n=3), cell(18.0, 0.1, n=3), "fid") == "reproduced"
    assert outcome(cell(18.0, 0.1, n=3), cell(6.0, 0.1, n=3), "fid") == "not reproduced"


def test_one_seed_without_an_interval_proves_nothing_but_counts_are_exact():
    assert outcome_of(cell(1.0), cell(9.0), "fid") == (
        "not significant",
        "a difference of +8, but one seed and no interval",
    )
    assert outcome_of(cell(1.08), cell(4.19), "tmacs_pair") == ("reproduced", "difference +3.11, counted")
    assert outcome(cell(4.19), cell(4.19), "tmacs_pair") == "not significant"


def test_equal_seeds_without_spread_are_a_difference_all_the_same():
    assert outcome(cell(2.0, 0.0, n=2), cell(3.0, 0.0, n=2), "fid") == "reproduced"
    assert outcome(cell(2.0, 0.0, n=2), cell(2.0, 0.0, n=2), "fid") == "not significant"


def test_an_order_is_its_neighbours_in_the_metric_that_stands_in():
    rows = [row("a", geneval=cell(0.6, 0.01, n=3)), row("b", geneval=cell(0.5, 0.01, n=3)), row("c")]
    outcomes = verdicts(rows, [Expectation("fid", ["a", "b", "c"])], {"fid": "geneval"})
    assert [(v.better, v.worse, v.metric, v.outcome) for v in outcomes] == [
        ("a", "b", "geneval", "reproduced"),
        ("b", "c", "geneval", "not measured"),
    ]
    assert str(outcomes[0]) == (
        "Expected: 'a' better than 'b' in GenEval. Reproduced: difference +0.1, 95 % interval 0.0773 to 0.123, "
        "p < 0.001; a difference of 0.03 would be seen in 80 % of repetitions."
    )
    assert str(outcomes[1]).endswith("Not measured: nothing of 'c'.")


def test_a_metric_without_a_better_side_is_refused():
    rows = [row("a", tokens=cell(1.0)), row("b", tokens=cell(2.0))]
    with pytest.raises(ValueError, match="'tokens', of which neither more nor less is better"):
        verdicts(rows, [Expectation("tokens", ["a", "b"])], {})
