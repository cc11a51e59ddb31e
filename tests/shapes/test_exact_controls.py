"""Controls of the exact score over its own prompts: right images score 1, wrong ones about 0, at every size.

Slow tests repeat the controls on as many prompts as the suite has, and on a model that was trained for 100 steps.
"""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sana_lab import api
from sana_lab.bench.untrained import build_untrained
from sana_lab.config import experiments
from sana_lab.diffusion.sampling import Sampling
from sana_lab.evaluation.evaluate import evaluate
from sana_lab.shapes.controls import CONTROLS, draw, images, right_things
from sana_lab.shapes.detector import analyse
from sana_lab.shapes.exact import ExactShapes, judge
from sana_lab.training.train import train

FEW, MANY = 6, 100  # prompts per task


def score(name: str, size: int, per_task: int) -> tuple[float, int]:
    """`exact` of a control's images, over the tasks to which it applies, and their number."""
    measure = ExactShapes(prompts_per_task=per_task, images_per_prompt=1)
    for image, row in images(CONTROLS[name], measure.rows, size):
        measure.add(torch.from_numpy(image)[None], [row])
    return _overall(measure), len(measure.verdicts.items)


def _overall(measure: ExactShapes) -> float:
    values = measure.report().values
    return values["exact" if "exact" in values else "exact_partial"].value


def _hold(name: str, size: int, per_task: int, least: int) -> None:
    value, number = score(name, size, per_task)
    assert number >= least
    if CONTROLS[name].right:
        assert value == 1.0
    else:
        assert value <= 0.02


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("name", CONTROLS)
def test_controls(name: str, size: int) -> None:
    _hold(name, size, FEW, 6)


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("name", CONTROLS)
def test_controls_of_many_prompts(name: str, size: int) -> None:
    _hold(name, size, MANY, 12)


def test_one_object_more_is_the_only_fault() -> None:
    measure = ExactShapes(prompts_per_task=12)
    for image, row in images(CONTROLS["one object more"], measure.rows, 64):
        _, reason = judge(analyse(image), row)
        assert reason.startswith("expected nothing else, found black ")
        assert ";" not in reason


def test_right_scenes_are_right_by_their_own_objects() -> None:
    """Also where the relation is between two small objects."""
    for i, row in enumerate(ExactShapes(prompts_per_task=12).rows):
        things = right_things(row, i)
        assert len(things) == sum(need["count"] for need in row["include"])
        assert {t.shape for t in things} == {need["class"] for need in row["include"]}


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
    images = torch.from_numpy(np.stack([draw(right_things(row, i), 64) for i, row in enumerate(measure.rows)]))
    encode = autoencoder(name).encode
    latents = torch.cat([encode(part / 127.5 - 1) for part in images.float().split(16)])  # type: ignore[operator]
    measure.add(decoded(name, latents), measure.rows)
    return _overall(measure)


@pytest.mark.parametrize(("name", "least"), [("shapes_vae_f8", 1.0), ("shapes_dcae_f32", 0.94)])
def test_reconstructions(name: str, least: float) -> None:
    """The 8x autoencoder keeps everything; the 32x one loses a few of three and four small objects."""
    assert reconstructed(name, FEW) >= least


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("shapes_vae_f8", 0.995), ("shapes_dcae_f32", 0.95)])
def test_reconstructions_of_many(name: str, least: float) -> None:
    assert reconstructed(name, MANY) >= least


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_decoded_noise(name: str) -> None:
    measure = ExactShapes(prompts_per_task=FEW, images_per_prompt=1)
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
