"""README's pictures: what the shipped model draws for them now is what the committed verdicts say, by the judge."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_world
import torch
from PIL import Image

from sana_lab.shapes.scenes import Scene, Thing, render

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    import readme_pictures

    return readme_pictures


@pytest.fixture
def record() -> Any:
    return json.loads((FOLDER / "results/shapes_sana/readme.json").read_text())


def test_the_shipped_model_draws_them_right(script: Any, record: Any):
    verdicts = script.judged(script.pictures())
    assert [each["prompt"] for each in record["pictures"]] == list(script.ASKS)
    assert [each["right"] for each in record["pictures"]] == [right for right, _ in verdicts]
    assert sum(right for right, _ in verdicts) == len(verdicts) >= 8, verdicts


def test_other_scenes_are_wrong(script: Any):
    """The judge passes a scene for its own prompt alone."""
    scenes = [
        (Thing("circle", "red", (0.5, 0.5), 0.13),),
        (Thing("circle", "red", (0.3, 0.5), 0.13), Thing("square", "blue", (0.7, 0.5), 0.13)),
        (Thing("circle", "red", (0.7, 0.5), 0.13), Thing("square", "blue", (0.3, 0.5), 0.13)),
    ]
    images = torch.from_numpy(render(tiny_world.pack([Scene("mixed", things) for things in scenes]), 64))
    relation = list(script.ASKS).index("a photo of a red circle left of a blue square")
    by_scene = [script.judged(image.expand(len(script.ASKS), -1, -1, -1)) for image in images]
    assert [[i for i, (right, _) in enumerate(verdicts) if right] for verdicts in by_scene] == [[0], [relation], []]


def test_the_picture_shows_eight_of_them():
    with Image.open(FOLDER / "results/shapes_sana/readme.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    assert pixels.shape[1] > 8 * 64
    assert pixels.std() > 10
