"""Budgets in images and FLOPs are numbers of steps."""

from pathlib import Path

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from sana_lab.bench import training_cost
from sana_lab.config import experiments, hashing
from sana_lab.config.specs import SpecError
from sana_lab.types import Text


@pytest.fixture
def folder(here: Path) -> Path:
    text = tiny.EXPERIMENT.replace("max_steps: 4, ", "")
    tiny.write_experiment(here, text=text, changes={"prompts": []})
    return here


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        (["trainer.max_images=40"], 10),  # batches of 4
        (["trainer.max_images=41"], 11),
        (["trainer.max_images=1"], 1),
        (["trainer.max_images=40", "trainer.accumulate=2"], 5),
        (["trainer.max_images=40", "trainer.max_steps=null"], 10),
    ],
)
def test_images_are_steps_of_a_batch(folder, overrides, steps):
    experiment = experiments.load("tiny", overrides)
    assert experiment["trainer"]["max_steps"] == steps
    assert experiments.complete(experiment) == experiment
    same = [o for o in overrides if "max_" not in o] + [f"trainer.max_steps={steps}"]
    assert hashing.experiment_hash(experiment) == hashing.experiment_hash(experiments.load("tiny", same))


def test_flops_are_those_of_forward_and_backward(folder):
    """Within 10 % of torch's own counter on a real step, and equal to the dry run's.

    Without Mix-FFN: torch's counter takes the backward of a depthwise convolution for that of a whole one.
    """
    mlp = "system.dit.ffn=mlp"
    experiment = experiments.load("tiny", ["trainer.max_steps=7", mlp])
    system = tiny.text2image(dit=experiment["system"]["dit"], text_encoder=experiment["system"]["text_encoder"])
    text = Text(torch.randn(4, 24, system.text_encoder.dim), torch.ones(4, 24, dtype=torch.bool))
    with FlopCounterMode(display=False) as counter:
        system.dit(torch.randn(4, *system.latent_shape(32)), torch.rand(4), text).square().mean().backward()
    flops = training_cost.step_flops(experiment)
    assert flops == training_cost.training_cost(experiment).flops
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.1)
    budget = experiments.load("tiny", [f"trainer.max_flops={7 * flops}", mlp])
    assert budget == experiment
    double = experiments.load("tiny", [f"trainer.max_flops={7 * flops}", "system.dit.depth=2", mlp])
    assert 3 < double["trainer"]["max_steps"] < 7


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["trainer.max_images=40", "trainer.max_steps=9"],
            "trainer.max_images is 40 and trainer.max_steps is 9; expected one of them, and the others null",
        ),
        (["trainer.max_images=40", "trainer.max_flops=1e9"], "expected one of them"),
        (["trainer.max_flops=1e9", "trainer.max_seconds=5"], "expected one of them"),
        (["trainer.max_images=0"], r"trainer.max_images is 0 \(int\), expected"),
        (["trainer.max_images=40", "system=attributes", "data={name: shapes, batch: many}"], "batch is 'many'"),
    ],
)
def test_exactly_one_is_given(folder, overrides, words):
    with pytest.raises(SpecError, match=words):
        experiments.load("tiny", overrides)


def test_a_base_with_steps_takes_null(folder):
    tiny.write(folder, "experiments/longer.yaml", "base: tiny\ntrainer: {max_steps: 50}\n")
    with pytest.raises(SpecError, match="expected one of them, and the others null"):
        experiments.load("longer", ["trainer.max_images=40"])
    assert experiments.load("longer", ["trainer.max_images=40", "trainer.max_steps=null"])["trainer"]["max_steps"] == 10
