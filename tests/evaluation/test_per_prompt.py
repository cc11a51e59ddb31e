"""What measures of prompts share: intervals over clusters, and benchmarks of which a part came."""

import numpy as np
import pytest
from scipy import stats

from sana_lab.evaluation.per_prompt import Roster, Scored, clustered_mean
from sana_lab.intervals import cluster_bootstrap


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


def test_scores_are_gathered_in_order() -> None:
    scored = Scored()
    scored.add(["a", "b"], [1, 2])
    scored.add(["a"], [6])
    assert (scored.values, scored.prompts) == ([1, 2, 6], ["a", "b", "a"])
    assert scored.counts() == {"images": 3, "prompts": 2}
    assert scored.mean().n == 2
    with pytest.raises(ValueError, match="for 'c' is inf"):
        scored.add(["c"], [float("inf")])


def test_a_roster_knows_what_came() -> None:
    roster = Roster([{"prompt": "a"}, {"prompt": "b"}], 2)
    assert roster.partial
    for prompt in ("a", "b", "a", "b"):
        assert roster.partial
        roster.came[roster.position_of({"prompt": prompt})] += 1
    assert not roster.partial
    roster.came[0] += 1
    assert roster.partial, "uneven"
    assert roster.settings() == {
        "partial": True,
        "prompts": 2,
        "prompts_expected": 2,
        "images": 5,
        "images_expected": 4,
        "images_per_prompt": [2, 3],
    }
    with pytest.raises(ValueError, match=r"prompt 'c' is none of this benchmark's 2; there is: a, b"):
        roster.position_of({"prompt": "c"})
    with pytest.raises(ValueError, match="have the same prompt"):
        Roster([{"prompt": "a"}, {"prompt": "a"}], 1)
