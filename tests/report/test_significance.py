"""Differences from a baseline row: paired where prompts and noise are shared, over seeds where there are several."""

import numpy as np
import pytest
from scipy import stats

from sana_lab.config.specs import SpecError
from sana_lab.report import render, significance
from sana_lab.report.significance import PAIRED, SEEDS, differences, marked, note
from sana_lab.report.table import build_table


def records(values: dict[str, list[float]]) -> list[dict]:
    return [
        {"label": label, "labels": {}, "seed": seed, "status": "finished", "metrics": {"geneval": x, "latency_s": 1.0}}
        for label, xs in values.items()
        for seed, x in enumerate(xs)
    ]


def report_of(values: np.ndarray, drawn: str = "a", each: int = 1) -> dict:
    return {"per_image": {"geneval": {"values": values.tolist(), "drawn": drawn, "images_per_prompt": each}}}


def noisy(shift: float, n: int = 200) -> np.ndarray:
    """Shared noise far larger than the shift, and a little of its own."""
    shared, own = np.random.default_rng(0).normal(size=n), np.random.default_rng(int(shift * 1e6) + 1).normal(size=n)
    return shared + 0.01 * own + shift


def test_pairing_finds_what_the_spread_of_both_hides():
    rows = build_table(records({"plain": [0.0], "better": [0.01]}), title="t").rows
    a, b = noisy(0.0), noisy(0.01)
    difference = differences(rows, {"plain": report_of(a), "better": report_of(b)}, "plain")["better"]["geneval"]
    expected = stats.ttest_rel(b, a).confidence_interval(0.95)
    assert (difference.low, difference.high) == pytest.approx((expected.low, expected.high))
    assert difference.test == PAIRED
    assert difference.significant
    assert stats.ttest_ind(b, a).pvalue > 0.5
    assert "latency_s" not in differences(rows, {}, "plain")["better"]


def test_images_of_one_prompt_count_once():
    once, again = noisy(0.0, 50), noisy(0.002, 50)
    single = significance.paired(report_of(again), report_of(once), "geneval")
    fourfold = significance.paired(report_of(again.repeat(4), each=4), report_of(once.repeat(4), each=4), "geneval")
    assert fourfold.low == pytest.approx(single.low)
    assert fourfold.high == pytest.approx(single.high)


def test_other_prompts_or_noise_are_not_paired():
    a = noisy(0.0)
    assert significance.paired(report_of(a), report_of(a, drawn="b"), "geneval") is None
    assert significance.paired(report_of(a), {}, "geneval") is None


def test_several_seeds_are_compared_as_seeds():
    values = {"plain": [0.50, 0.52, 0.51], "better": [0.60, 0.63, 0.61], "same": [0.50, 0.53, 0.49]}
    rows = build_table(records(values), title="t").rows
    tests = differences(rows, {}, "plain")
    interval = stats.ttest_ind(values["better"], values["plain"], equal_var=False).confidence_interval(0.95)
    better = tests["better"]["geneval"]
    assert (better.low, better.high) == pytest.approx((interval.low, interval.high))
    assert (better.test, better.significant, tests["same"]["geneval"].significant) == (SEEDS, True, False)


@pytest.mark.parametrize("name", ["params_m", "gmacs", "tokens", "images", "prompts", "head_params_m"])
def test_counts_have_no_test_and_no_mark(name):
    """Counts of several seeds are equal, so that any difference would pass for significant."""
    cells = {"plain": [4.0, 4.0], "wide": [8.0, 8.0]}
    rows = build_table([{**r, "metrics": {name: r["metrics"]["geneval"]}} for r in records(cells)], title="t").rows
    assert differences(rows, {}, "plain") == {"wide": {}}
    assert significance.mark(name, significance.Difference(1.0, 1.0, 1.0, SEEDS)) == ""


def test_a_table_shows_marks_and_names_the_test():
    values = {"plain": [0.50, 0.52, 0.51], "better": [0.60, 0.63, 0.61], "worse": [0.1, 0.12, 0.11]}
    table = build_table(records(values), title="t")
    tests = differences(table.rows, {}, "plain")
    marks = marked(tests)
    assert [marks[label]["geneval"]["mark"] for label in ("better", "worse")] == ["▲", "▼"]
    assert note(tests, "plain")[0].endswith(f"{SEEDS}.")
    text = render.to_markdown(type(table)(**{**vars(table), "differences": marks}))
    assert "0.61 ± 0.02 ▲" in text
    assert "0.11 ± 0.01 ▼" in text


def test_a_baseline_that_is_no_row_is_refused():
    rows = build_table(records({"plain": [0.5], "better": [0.6]}), title="t").rows
    with pytest.raises(SpecError, match="'plan', which is no row; did you mean 'plain'"):
        differences(rows, {}, "plan")
