"""Bookkeeping of measures with prompts: scores per image, coverage of a benchmark."""

import pytest

from sana_lab.evaluation.per_prompt import Coverage, PromptScores


def test_scores_are_gathered_in_order() -> None:
    scores = PromptScores()
    scores.add(["a", "b"], [1, 2])
    scores.add(["a"], [6])
    assert (scores.values, scores.prompts) == ([1, 2, 6], ["a", "b", "a"])
    assert scores.counts() == {"images": 3, "prompts": 2}
    assert scores.mean().n == 2
    with pytest.raises(ValueError, match="for 'c' is inf"):
        scores.add(["c"], [float("inf")])


def test_coverage_counts_images() -> None:
    coverage = Coverage([{"prompt": "a"}, {"prompt": "b"}], 2)
    assert coverage.partial
    for prompt in ("a", "b", "a", "b"):
        assert coverage.partial
        coverage.count(coverage.index_of({"prompt": prompt}))
    assert not coverage.partial
    coverage.count(0)
    assert coverage.partial, "uneven"
    assert coverage.settings() == {
        "partial": True,
        "prompts": 2,
        "prompts_expected": 2,
        "images": 5,
        "images_expected": 4,
        "images_per_prompt": [2, 3],
    }
    twice = Coverage([{"prompt": "a"}, {"prompt": "b"}], 2, times=[1, 2])
    for row in (0, 0, 1, 1):
        twice.count(row)
    assert twice.partial
    twice.count(1)
    twice.count(1)
    assert not twice.partial
    assert twice.settings()["images_expected"] == 6
    with pytest.raises(ValueError, match=r"prompt 'c' is none of this benchmark's 2; there is: a, b"):
        coverage.index_of({"prompt": "c"})
    with pytest.raises(ValueError, match="have the same prompt"):
        Coverage([{"prompt": "a"}, {"prompt": "a"}], 1)
