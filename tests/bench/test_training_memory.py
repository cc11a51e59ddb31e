"""Computed memory of trainings, against the bytes of live tensors of real steps, and what its stages depend on."""

import pytest
import tiny
import two_processes

from sana_lab.bench import training_cost, training_memory
from sana_lab.bench.fit import memory_problem
from sana_lab.config import experiments, specs
from sana_lab.costs.live_memory import LiveBytes
from sana_lab.training.checks import check


@pytest.fixture
def cached(here):
    """The DiT on cached latents and features."""
    two_processes.write(here)
    return experiments.load("cached", ["data.batch=16"])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.filterwarnings("ignore:You are trying to `self.log")  # without a trainer
def test_activations_of_a_step_on_cached_latents_are_those_of_a_real_one(cached, checkpointing):
    experiment = experiments.load("cached", ["data.batch=16", f"system.dit.checkpointing={checkpointing}"])
    system = specs.build("system", experiment["system"]).train()
    batch = specs.build("data", experiment["data"]).train_batch(0)
    gradients = sum(4 * p.numel() for p in system.parameters())
    with LiveBytes(system.parameters()) as live:
        system.training_step(batch, 0).backward()
    cost = training_cost.training_cost(experiment)
    assert cost.stages.step == pytest.approx(live.peak - gradients, rel=0.25)


def test_encoding_happens_before_the_steps_of_a_cache_and_within_those_of_images(cached, here):
    stages = training_cost.training_cost(cached).stages
    assert stages.encoding > 0
    assert stages.peak == stages.process + max(stages.encoding, stages.state + stages.step)
    images = training_cost.training_cost(experiments.load("tiny")).stages
    assert images.encoding == 0
    larger = experiments.load("tiny", ["system.autoencoder.widths=[64,64,64,64]"])
    assert training_cost.training_cost(larger).stages.step > 2 * images.step


def test_tiles_take_less_to_encode():
    tiled, whole = (training_memory._encoding({**tiny.DCAE, "tile": tile}, 1024) for tile in (16, None))
    assert tiled < 0.8 * whole


def test_shards_divide_what_a_parameter_takes(cached):
    copies, shards = (
        training_cost.training_cost(experiments.load("cached", [f"trainer.strategy={s}"]), 4).stages.state
        for s in ("ddp", "fsdp2")
    )
    assert shards == copies // 4


def test_a_cache_whose_encoding_cannot_fit_is_told_of_tiles(cached):
    cost = training_cost.training_cost(cached)
    large = cost._replace(stages=cost.stages._replace(encoding=2**40))
    problem = memory_problem([large], "cached", 2**38)
    assert problem is not None
    assert problem.text.endswith("what would fit: a smaller `tile` of the autoencoder that encodes the data")


def test_the_batch_of_a_cache_is_no_batch_of_pixels(here):
    """The source's own batch has no effect."""
    two_processes.write(here)
    check(experiments.load("cached", ["data.source.source.batch=60000", "data.source.source.size=4096"]))


def test_sampling_is_stated_for_systems_that_sample(cached, here):
    (line,) = training_memory.sampling_lines(cached)
    assert "memory of sampling an image of 32 px, decoded whole: " in line
    tiny.write(here, "experiments/squeeze.yaml", tiny.SQUEEZE)
    assert training_memory.sampling_lines(experiments.load("squeeze")) == []


def test_the_state_is_that_of_the_optimizer():
    optimizers = [
        {"name": "adamw"},
        "sgd",
        {"name": "adamw_8bit"},
        {"name": "came", "bits": 32},
        {"name": "came", "bits": 8},
    ]
    assert [training_memory.training_bytes({"optimizer": spec}) for spec in optimizers] == [20, 20, 14, 16, 13]
    assert training_memory.training_bytes({}) == 20  # of an autoencoder
