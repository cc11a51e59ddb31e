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
