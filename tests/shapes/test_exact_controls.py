"""Controls of the exact score over its own prompts: right images score 1, wrong ones about 0, at every size.

Right images are scenes made for each prompt. Slow tests repeat the controls on whole suites, and on a model that was
trained for 100 steps.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_world import pack
from torch import Tensor

from sana_lab import api
from sana_lab.bench.untrained import build_untrained
from sana_lab.config import experiments
from sana_lab.diffusion.sampling import Sampling
from sana_lab.evaluation.evaluate import evaluate
from sana_lab.shapes import scenes as world
from sana_lab.shapes.detector import Analysis
from sana_lab.shapes.exact import ExactShapes, judge
from sana_lab.shapes.scenes import Scene, Thing
from sana_lab.training.train import train
from sana_lab.types import Json

Picture = NDArray[np.uint8]
Change = Callable[[Json, tuple[Thing, ...]], tuple[Thing, ...] | None]
"""(row, things of its right scene) -> things of a wrong one; None where the change does not apply"""

FIVE = [(0.17, 0.17), (0.83, 0.17), (0.17, 0.83), (0.83, 0.83), (0.5, 0.5)]
SMALL = 7.5 / 64


def draw(things: Sequence[Thing], size: int) -> Picture:
    """Any number of things that do not touch."""
    single = world.render(pack([Scene("mixed", (thing,)) for thing in things]), size).astype(int)
    ground = np.array(world.BACKGROUND)[:, None, None]
    return (ground + (single - ground).sum(0)).astype(np.uint8)


def truth(things: Sequence[Thing]) -> Analysis:
    return Analysis(tuple(world.objects(Scene("mixed", tuple(things)), 64)), 0)


def things_for(row: Json, i: int) -> tuple[Thing, ...]:
    """Things that a row clearly asks for, with other colours, sizes and places for each i.

    A relation is as clear as in the world's captions; GenEval's rule decides also between them.
    """
    names = [(need["class"], need.get("color")) for need in row["include"] for _ in range(need["count"])]
    kind = {1: "single", 2: "pair"}.get(len(names), "count")
    where = row["include"][-1].get("position", [None])[0]
    for index in range(1000):
        layout = world.scene(world.scenes(i, [index], np.eye(4)[world.KINDS.index(kind)].tolist()), 0).things
        pairs = zip(names, layout, strict=False)
        things = tuple(Thing(name, color or t.color, t.center, t.radius) for (name, color), t in pairs)
        if len(layout) == len(names) and where in (None, world.relation(things[-1], things[0])):
            return things
    raise AssertionError(f"no scene of 1,000 is right for {row['prompt']}")


def same(row: Json, things: tuple[Thing, ...]) -> tuple[Thing, ...]:
    return things


def one_more(row: Json, things: tuple[Thing, ...]) -> tuple[Thing, ...]:
    """A further thing of any class, in a layout of five."""
    further = Thing(world.SHAPES[len(row["prompt"]) % 4], "black", FIVE[4], SMALL)
    moved = [t._replace(center=FIVE[k], radius=SMALL) for k, t in enumerate(_ordered(things))]
    return (*moved, further)


def _ordered(things: tuple[Thing, ...]) -> list[Thing]:
    """From left to right, so that the first is left of the second also in the layout of five."""
    return sorted(things, key=lambda t: t.center)


def exchanged(row: Json, things: tuple[Thing, ...]) -> tuple[Thing, ...] | None:
    """The two things of a relation in each other's places, those of two colours with each other's colours."""
    if row["tag"] == "position":
        a, b = things
        return a._replace(center=b.center), b._replace(center=a.center)
    if row["tag"] == "color_attr":
        a, b = things
        return a._replace(color=b.color), b._replace(color=a.color)
    return None


def one_fewer(row: Json, things: tuple[Thing, ...]) -> tuple[Thing, ...]:
    return things[1:] or (things[0]._replace(shape=world.SHAPES[world.SHAPES.index(things[0].shape) - 1]),)


def recounted(row: Json, things: tuple[Thing, ...]) -> tuple[Thing, ...] | None:
    """Two for three, three for four, four for two."""
    if row["tag"] != "counting":
        return None
    number = {2: 4, 3: 2, 4: 3}[len(things)]
    return tuple(things[0]._replace(center=FIVE[k], radius=SMALL) for k in range(number))


def debris(image: Picture) -> Picture:
    """A black block of less than a quarter of the smallest object, in the place farthest from the objects."""
    scale, side = image.shape[-1] // 64, 4 * (image.shape[-1] // 64)
    is_ground = (image == np.array(world.BACKGROUND)[:, None, None]).all(0)
    free = [
        (y, x)
        for y in range(0, 64 * scale - side, scale)
        for x in range(0, 64 * scale - side, scale)
        if is_ground[y : y + side, x : x + side].all()
    ]
    y, x = free[len(free) // 2]
    image = image.copy()
    image[:, y : y + side, x : x + side] = 0
    return image


def tinted(image: Picture) -> Picture:
    return (image * np.array([1.15, 1.0, 0.9])[:, None, None]).clip(0, 255).astype(np.uint8)


def unchanged(image: Picture) -> Picture:
    return image


WRONG: dict[str, tuple[Change, Callable[[Picture], Picture]]] = {
    "one more": (one_more, unchanged),
    "exchanged": (exchanged, unchanged),
    "one fewer": (one_fewer, unchanged),
    "recounted": (recounted, unchanged),
    "debris": (same, debris),
    "tinted": (same, tinted),
}


def score(change: Change, spoil: Callable[[Picture], Picture], size: int, per_task: int) -> tuple[float, int]:
    """`exact` of the changed scenes of all rows, of those tasks to which the change applies, and their number."""
    measure = ExactShapes(prompts_per_task=per_task, images_per_prompt=1)
    for i, row in enumerate(measure.rows):
        things = change(row, things_for(row, i))
        if things is not None:
            measure.add(torch.from_numpy(spoil(draw(things, size)))[None], [row])
    return _overall(measure), len(measure.verdicts.items)


def _overall(measure: ExactShapes) -> float:
    values = measure.report().values
    return values["exact" if "exact" in values else "exact_partial"].value


def wrong_captions(size: int, per_task: int) -> float:
    """`exact` of right scenes with another row's caption of the same task, which is not true of them by chance."""
    measure = ExactShapes(prompts_per_task=per_task, images_per_prompt=1)
    for i, row in enumerate(measure.rows):
        things = things_for(row, i)
        others = [r for r in measure.rows[i + 1 :] + measure.rows[:i] if r["tag"] == row["tag"]]
        wrong = next((r for r in others if not judge(truth(things), r)[0]), None)
        if wrong is not None:
            measure.add(torch.from_numpy(draw(things, size))[None], [wrong])
    return _overall(measure)


@pytest.mark.parametrize("size", [64, 128, 256])
class TestSmall:
    def test_right_scenes(self, size: int) -> None:
        assert score(same, unchanged, size, 6) == (1.0, 34)

    @pytest.mark.parametrize("name", WRONG)
    def test_wrong_scenes(self, size: int, name: str) -> None:
        value, images = score(*WRONG[name], size, 6)
        assert images >= 6
        assert value <= 0.02

    def test_wrong_captions(self, size: int) -> None:
        assert wrong_captions(size, 6) <= 0.02


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 128, 256])
class TestLarge:
    def test_right_scenes(self, size: int) -> None:
        assert score(same, unchanged, size, 100)[0] == 1.0

    @pytest.mark.parametrize("name", WRONG)
    def test_wrong_scenes(self, size: int, name: str) -> None:
        assert score(*WRONG[name], size, 100)[0] <= 0.02

    def test_wrong_captions(self, size: int) -> None:
        assert wrong_captions(size, 100) <= 0.02


# --- models ---------------------------------------------------------------------------------------------------------

AUTOENCODERS = ("shapes_vae_f8", "shapes_dcae_f32")


@cache
def autoencoder(name: str) -> torch.nn.Module:
    module: torch.nn.Module = api.load(name).autoencoder
    return module


@torch.no_grad()
def decoded(name: str, latents: Tensor) -> Tensor:
    pixels = torch.cat([autoencoder(name).decode(part) for part in latents.split(16)])  # type: ignore[operator]
    return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def reconstructed(name: str, per_task: int) -> float:
    """`exact` of right scenes after an autoencoder's reconstruction."""
    measure = ExactShapes(prompts_per_task=per_task, images_per_prompt=1)
    images = torch.from_numpy(np.stack([draw(things_for(row, i), 64) for i, row in enumerate(measure.rows)]))
    encode = autoencoder(name).encode
    latents = torch.cat([encode(part / 127.5 - 1) for part in images.float().split(16)])  # type: ignore[operator]
    measure.add(decoded(name, latents), measure.rows)
    return _overall(measure)


@pytest.mark.parametrize(("name", "least"), [("shapes_vae_f8", 1.0), ("shapes_dcae_f32", 0.94)])
def test_reconstructions(name: str, least: float) -> None:
    """The 8x autoencoder keeps everything; the 32x one loses a few of three and four small objects."""
    assert reconstructed(name, 6) >= least


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("shapes_vae_f8", 0.995), ("shapes_dcae_f32", 0.95)])
def test_reconstructions_of_many(name: str, least: float) -> None:
    assert reconstructed(name, 100) >= least


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_decoded_noise(name: str) -> None:
    measure = ExactShapes(prompts_per_task=6, images_per_prompt=1)
    shape = autoencoder(name).encode(torch.zeros(1, 3, 64, 64)).shape  # type: ignore[operator]
    noise = torch.randn(len(measure.rows), *shape[1:], generator=torch.Generator().manual_seed(0))
    measure.add(decoded(name, noise), measure.rows)
    assert _overall(measure) == 0


def test_an_untrained_model() -> None:
    experiment = experiments.load("shapes", ["system.dit.zero_head=false", "system.dit.depth=1"])
    system, measure = build_untrained(experiment), ExactShapes(prompts_per_task=4, images_per_prompt=1)
    system.autoencoder.load_state_dict(autoencoder("shapes_vae_f8").state_dict())
    prompts = [row["prompt"] for row in measure.rows]
    images = system.eval().sample(prompts, size=64, sampling=Sampling(solver="euler", steps=4), seed=0, batch=8)
    measure.add(images.cpu(), measure.rows)
    assert _overall(measure) == 0


@pytest.mark.slow
def test_a_model_trained_for_100_steps(here: Path) -> None:
    steps = ["trainer.max_steps=100", "data.items=2000", "trainer.validate_every=1000"]
    experiment = experiments.load("shapes", steps)
    train(experiment)
    report = evaluate("shapes", steps)
    assert report["exact"]["overall"] <= 0.02
