"""Regions from GenEval's prompts."""

import pytest

from sana_lab.evaluation.geneval.prompts import find_prompts, prompts, read_rows
from sana_lab.evaluation.geneval.regions import HALVES, Relations
from sana_lab.shapes.scenes import SHAPES

ROWS = {
    "shapes": prompts(60, 43, classes=SHAPES),
    "published": read_rows(find_prompts("geneval.jsonl")),
}


@pytest.mark.parametrize("benchmark", ROWS)
def test_every_position_prompt_has_two_halves_and_no_other_has_any(benchmark: str):
    """As its row says, and not as its words do: the second object's position is relative to the first of `include`."""
    for row in ROWS[benchmark]:
        regions = Relations().plan(row["prompt"])
        if row["tag"] != "position":
            assert regions == [], row
            continue
        other, placed = row["include"]
        assert [r.box for r in regions] == [*HALVES[placed["position"][0]]]
        for region, need in zip(regions, (placed, other), strict=True):
            assert region.prompt.startswith("a photo of a")
            assert region.prompt.endswith(f" {need['class']}")


@pytest.mark.parametrize("benchmark", ROWS)
def test_pairs_have_halves_on_request(benchmark: str):
    rule = Relations(pairs=True)
    for row in ROWS[benchmark]:
        regions = rule.plan(row["prompt"])
        if row["tag"] not in ("two_object", "color_attr"):
            assert bool(regions) == (row["tag"] == "position"), row
            continue
        assert [r.box for r in regions] == [(0, 0, 0.5, 1), (0.5, 0, 1, 1)]
        for region, need in zip(regions, row["include"], strict=True):
            assert need["class"] in region.prompt
            assert need.get("color", "") in region.prompt


def test_other_words():
    plan = Relations().plan
    assert [r.prompt for r in plan("a red circle to the left of a star")] == ["a red circle", "a star"]
    assert plan("a star and a circle left of a square") == []
    assert plan("two stars above a square") == []
    assert plan("") == []
