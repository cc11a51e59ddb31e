"""The quickstart's rows that come trained: all of them ship, small enough, and their pictures are right (slow)."""

import pytest
import tiny_world
import torch

from sana_lab.ablation import plan, shipping
from sana_lab.checkpoints import weights
from sana_lab.config import experiments
from sana_lab.evaluation import sources
from sana_lab.pretrained import restore
from sana_lab.shapes.detector import analyse
from sana_lab.shapes.exact import judge
from sana_lab.shapes.scenes import Scene, Thing, render
from sana_lab.types import Json

RIGHT = 3
"""Of the four pictures of a row, those that have to hold exactly what their prompt says."""

NOT_YET = {"DiT baseline": 0, "+ linear attention": 2, "+ Mix-FFN": 1, "+ 32x autoencoder": 2}
"""Rows with fewer right pictures, and how many, after 512,000 images."""

MEGABYTES = 45
"""The largest sum of all files."""

QUICKSTART = plan.load("quickstart")


def one(shape: str, color: str, count: int = 1, **more: Json) -> Json:
    """What a prompt asks for, as in GenEval's rows."""
    return {"class": shape, "count": count, "color": color, **more}


ASKS = {
    "a red circle": [one("circle", "red")],
    "a photo of a blue square and a green triangle": [one("square", "blue"), one("triangle", "green")],
    "three yellow circles": [one("circle", "yellow", count=3)],
    "a photo of a pink cross left of a black square": [
        one("square", "black"),
        one("cross", "pink", position=["left of", 0]),
    ],
}
"""Prompts of the experiment `shapes` -> their objects."""


def shipped() -> list[plan.Trial]:
    return [trial for trial in QUICKSTART.trials if trial.weights is not None]


def test_all_trained_rows_ship_or_none():
    trained = [trial.label for trial in QUICKSTART.trials if shipping.is_shippable(trial)]
    assert [trial.label for trial in shipped()] in ([], trained)


def test_every_file_is_that_of_a_row_and_all_are_small():
    paths = sorted(experiments.weights_folder("quickstart").glob("*.safetensors"))
    assert {path.resolve() for path in paths} == {trial.weights.resolve() for trial in shipped()}
    assert sum(path.stat().st_size for path in paths) <= MEGABYTES * 1e6
    for path in paths:
        card = weights.card(path)
        assert card["command"] == "sana-lab ablate quickstart --retrain"
        assert card["seconds"] > 0
        assert card["samples"] > 0
        assert card["environment"]["commit"]


def test_the_judge_sees_these_scenes_and_no_others():
    """Scenes drawn as the prompts say are right, each for its own prompt only."""
    scenes = [
        (thing("circle", "red", 0.5),),
        (thing("square", "blue", 0.3), thing("triangle", "green", 0.7)),
        tuple(thing("circle", "yellow", x) for x in (0.2, 0.5, 0.8)),
        (thing("cross", "pink", 0.3), thing("square", "black", 0.7)),
    ]
    images = torch.from_numpy(render(tiny_world.pack([Scene("mixed", things) for things in scenes]), 64))
    verdicts = [[judge(analyse(image), {"include": asks})[0] for asks in ASKS.values()] for image in images]
    assert verdicts == torch.eye(4, dtype=torch.bool).tolist()


def thing(shape: str, color: str, x: float) -> Thing:
    return Thing(shape, color, (x, 0.5), 0.13)


@pytest.mark.slow
@pytest.mark.parametrize("label", [trial.label for trial in QUICKSTART.trials if shipping.is_shippable(trial)])
def test_the_pictures_of_a_row_are_right(label: str):
    """Those of the table's picture: same prompts, same noise, the row's own sampler."""
    (trial,) = [trial for trial in QUICKSTART.trials if trial.label == label]
    if trial.weights is None:
        pytest.skip("its weights do not ship")
    prompts = trial.config["prompts"]
    assert [*ASKS] == prompts
    system = restore.restore(trial.config, trial.weights)
    images = sources.sampler(system.sample, trial.config)(prompts, list(range(len(prompts))))
    verdicts = {p: judge(analyse(i), {"include": ASKS[p]}) for p, i in zip(prompts, images, strict=True)}
    count = sum(right for right, _ in verdicts.values())
    if label in NOT_YET:
        assert count == NOT_YET[label], verdicts
        pytest.xfail(f"{count} of four are right, expected {RIGHT}")
    assert count >= RIGHT, verdicts
