"""GenEval's summary: plain means of tasks, shares of images and prompts, intervals, influences."""

import json

import pytest

from sana_lab.evaluation.geneval.summary import summarise


def test_summary_is_the_plain_mean_of_the_tasks() -> None:
    outcomes = [{"tag": "a", "prompt": str(i), "correct": [True, i % 2 == 0]} for i in range(40)]
    outcomes += [{"tag": "b", "prompt": "x", "correct": [False, False]}]
    report = summarise(outcomes)
    assert report["tasks"]["a"]["value"] == 0.75
    assert report["tasks"]["b"] == {"value": 0, "interval": [0, 0], "prompts": 1, "images": 2}
    assert report["overall"] == 0.375
    assert report["interval"][0] < 0.375 < report["interval"][1]
    assert (report["prompts"], report["images"]) == (41, 82)
    assert report["correct_images"] == pytest.approx(60 / 82)
    assert report["correct_prompts"] == pytest.approx(40 / 41)
    assert json.loads(json.dumps(report)) == report
    with pytest.raises(ValueError, match="no outcomes"):
        summarise([])


def test_prompts_that_are_all_that_exist_are_no_sample() -> None:
    """Four prompts whose images agree: over prompts the interval is wide, over images that of so many images."""
    rows = [[True] * 50, [True] * 50, [False] * 50, [True] * 50]
    outcomes = [
        {"tag": "single_object", "prompt": str(i), "correct": correct, "reasons": []} for i, correct in enumerate(rows)
    ]
    low, high = summarise(outcomes)["tasks"]["single_object"]["interval"]
    assert high - low > 0.5
    part = summarise(outcomes, exhausted=["single_object"])["tasks"]["single_object"]
    low, high = part["interval"]
    assert high - low == pytest.approx(2 * 1.96 * (0.75 * 0.25 / 200) ** 0.5, rel=0.1)
    assert (part["value"], part["prompts"], part["images"]) == (0.75, 4, 200)
