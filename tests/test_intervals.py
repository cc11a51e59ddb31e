"""Intervals: against closed forms, naive loops and their own promised coverage."""

import numpy as np
import pytest
from scipy import stats

from sana_lab.intervals import bootstrap_mean, cluster_bootstrap, clustered_mean, clustered_share, jackknife, wilson


def test_mean_interval_is_that_of_the_normal_law_for_many_values() -> None:
    values = np.random.default_rng(0).normal(5, 2, 800).tolist()
    estimate = bootstrap_mean(values, resamples=4000)
    assert estimate.value == pytest.approx(np.mean(values))
    half = 1.96 * np.std(values) / 800**0.5
    assert estimate.low == pytest.approx(estimate.value - half, abs=0.1 * half)
    assert estimate.high == pytest.approx(estimate.value + half, abs=0.1 * half)
    assert estimate.n == 800


def test_strata_weigh_the_same_whatever_their_size() -> None:
    strata = {"a": [[1.0]] * 90, "b": [[0.0]] * 10}
    assert cluster_bootstrap(strata) == (0.5, 0.5, 0.5, 100)


def test_within_a_stratum_images_weigh_the_same() -> None:
    assert cluster_bootstrap({"a": [[1, 1, 1], [0]]}).value == 0.75


def test_equals_a_naive_loop() -> None:
    rng = np.random.default_rng(1)
    strata = {t: [rng.integers(0, 2, 3).tolist() for _ in range(n)] for t, n in (("x", 12), ("y", 7))}
    draws = []
    for _ in range(3000):
        picked = {t: [c[i] for i in rng.integers(len(c), size=len(c))] for t, c in strata.items()}
        draws.append(np.mean([np.mean(np.concatenate(c)) for c in picked.values()]))
    estimate = cluster_bootstrap(strata, resamples=3000)
    assert [estimate.low, estimate.high] == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.02)


def test_images_of_a_prompt_are_not_counted_as_independent() -> None:
    rng = np.random.default_rng(2)
    repeated = [[float(right)] * 4 for right in rng.integers(0, 2, 50)]
    loose = [[right] for cluster in repeated for right in cluster]
    clustered, naive = cluster_bootstrap({"": repeated}), cluster_bootstrap({"": loose})
    assert (clustered.high - clustered.low) / (naive.high - naive.low) == pytest.approx(2, rel=0.1)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng, hits = np.random.default_rng(3), 0
    for trial in range(300):
        chances = {t: rng.beta(2, 2, 40) for t in "ab"}  # each prompt has its own chance; the mean over prompts is 0.5
        strata = {t: [rng.binomial(1, p, 4).tolist() for p in ps] for t, ps in chances.items()}
        estimate = cluster_bootstrap(strata, resamples=400, seed=trial)
        hits += estimate.low <= 0.5 <= estimate.high
    assert 0.90 <= hits / 300 <= 0.98


def test_the_seed_decides() -> None:
    values = np.random.default_rng(5).random(30).tolist()
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)


def test_the_level_decides_the_width() -> None:
    values = np.random.default_rng(6).random(100).tolist()
    narrow, wide = (bootstrap_mean(values, level=level) for level in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_nothing_to_average_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to average"):
        cluster_bootstrap({})
    with pytest.raises(ValueError, match="nothing to average in 'b'"):
        cluster_bootstrap({"a": [[1.0]], "b": []})


def test_jackknife_is_the_normal_interval_of_a_mean() -> None:
    values = np.random.default_rng(7).normal(5, 2, 400)
    estimate = jackknife(float(values.mean()), values - values.mean())
    half = 1.959964 * values.std(ddof=1) / 20
    assert estimate == pytest.approx((values.mean(), values.mean() - half, values.mean() + half, 400))


@pytest.mark.parametrize(("right", "low", "high"), [(0, 0.0, 0.2775), (5, 0.2366, 0.7634), (10, 0.7225, 1.0)])
def test_wilson_has_a_width_at_its_ends_too(right: int, low: float, high: float) -> None:
    """Ten outcomes, against the published table."""
    estimate = wilson([1] * right + [0] * (10 - right))
    assert estimate == pytest.approx((right / 10, low, high, 10), abs=1e-4)


# --- clustered means


def test_of_single_images_it_is_students_interval() -> None:
    values = np.random.default_rng(0).normal(3, 2, 40)
    found = clustered_mean(list(values), range(40))
    low, high = stats.t.interval(0.95, 39, values.mean(), stats.sem(values))
    assert found == pytest.approx((values.mean(), low, high, 40))


def test_images_of_a_prompt_are_one_observation() -> None:
    """Four times the same number says no more than once."""
    values = np.random.default_rng(1).normal(0, 1, 30)
    once = clustered_mean(list(values), range(30))
    assert clustered_mean(list(values.repeat(4)), np.arange(30).repeat(4).tolist()) == pytest.approx(once)


def test_it_agrees_with_the_bootstrap_over_clusters() -> None:
    rng = np.random.default_rng(2)
    groups = [list(rng.normal(rng.normal(), 0.5, rng.integers(1, 6))) for _ in range(200)]
    values, owners = [v for g in groups for v in g], [i for i, g in enumerate(groups) for _ in g]
    found, estimate = clustered_mean(values, owners), cluster_bootstrap({"": groups})
    assert found.value == pytest.approx(estimate.value)
    assert found.high - found.low == pytest.approx(estimate.high - estimate.low, rel=0.1)


def test_one_prompt_has_no_interval_and_none_no_mean() -> None:
    assert clustered_mean([1.0, 2.0], ["a", "a"]) == (1.5, None, None, 1)
    with pytest.raises(ValueError, match="no images came"):
        clustered_mean([], [])


class TestClusteredShare:
    """Intervals of shares lie in [0, whole], have a width at both ends, and are Wilson's up to the quantile."""

    @pytest.mark.parametrize("right", range(7))
    def test_it_stays_inside(self, right):
        estimate = clustered_share([1.0] * right + [0.0] * (6 - right), range(6))
        assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
        assert estimate.high - estimate.low > 0.1

    def test_of_many_independent_outcomes_it_is_wilsons(self):
        outcomes = [1.0] * 700 + [0.0] * 300
        ours, theirs = clustered_share(outcomes, range(1000)), wilson(outcomes)
        assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=2e-4)

    def test_copies_of_an_outcome_tell_nothing_new(self):
        outcomes = [1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
        once = clustered_share(outcomes, range(8))
        thrice = clustered_share([x for x in outcomes for _ in range(3)], [i for i in range(8) for _ in range(3)])
        assert (thrice.low, thrice.high) == pytest.approx((once.low, once.high))

    def test_per_cent_and_one_cluster(self):
        share, percent = clustered_share([1, 0.5, 1], "abc"), clustered_share([100, 50, 100], "abc", 100)
        assert (percent.low, percent.high) == pytest.approx((100 * share.low, 100 * share.high))
        assert clustered_share([1.0, 0.0], "aa").low is None
