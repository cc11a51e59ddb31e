"""The cost of a training before it begins, against what torch counts and against a training that was done here."""

import pytest
import tiny
import torch

from sana_lab import __main__
from sana_lab.bench import training_cost
from sana_lab.checkpoints import weights
from sana_lab.config import experiments
from sana_lab.config.memo import reusing
from sana_lab.costs import too_large
from sana_lab.training import train
from sana_lab.training.card import card


@pytest.fixture
def experiment(here):
    tiny.write_experiment(here)
    return experiments.load("tiny")


def test_parameters_are_those_of_the_system_and_flops_grow_with_the_batch(experiment):
    cost = training_cost.training_cost(experiment)
    system = tiny.build("system", experiment["system"])
    assert cost.parameters == sum(p.numel() for p in system.parameters())
    assert cost.trainable == sum(p.numel() for p in system.parameters() if p.requires_grad)
    twice = training_cost.training_cost({**experiment, "data": {**experiment["data"], "batch": 8}})
    assert twice.flops == 2 * cost.flops
    assert twice.memory - twice.fixed == pytest.approx(2 * (cost.memory - cost.fixed), rel=0.1)


def test_a_product_of_matrices_costs_three_forwards():
    layer = torch.nn.Linear(8, 16, bias=False, device="meta")
    inputs = (torch.empty(4, 8, device="meta", requires_grad=True),)
    macs, activations = training_cost._measure(layer, inputs)
    assert macs == 3 * 4 * 8 * 16
    assert activations >= 4 * 16 * 4


def test_time_is_that_of_a_training_of_this_machine(experiment):
    cost = training_cost.training_cost(experiment)
    assert cost.seconds is None
    assert "this machine has trained nothing yet" in cost.lines()[1]
    train.train(experiment, name="tiny")
    known = training_cost.training_cost(experiment)
    ((last, devices),) = training_cost._cards()
    assert devices == last["devices"] == 1
    assert known.seconds == pytest.approx(last["seconds"] / last["steps"])
    assert "as 'tiny' trained here" in known.lines()[1]


def test_time_is_that_of_as_many_devices(experiment, here):
    """A step of the same batch takes as long as it took, on one device and on two; CPU devices share the cores."""
    for devices in (1, 2):
        about = card(experiment, "tiny", 20.0 * devices, {}, 10, devices)
        weights.write(here / f"runs/models/{devices}/weights.safetensors", {"w": torch.zeros(1)}, about)
    assert training_cost.training_cost(experiment).seconds == pytest.approx(2)
    two = training_cost.training_cost(experiment, 2)
    assert two.seconds == pytest.approx(4)
    assert "on each of 2 devices; disk" in two.lines()[0]
    four = training_cost.training_cost(experiment, 4)
    assert four.seconds == pytest.approx(4, rel=0.1)  # all cores did one batch in that time
    assert four.origin.endswith("on 2 devices")


def test_a_card_that_leaves_devices_open_is_no_measure(monkeypatch):
    about = {"config": {"trainer": {"devices": "auto", "accelerator": "auto"}}}
    assert training_cost._devices_of(about) == 1
    monkeypatch.setattr(training_cost, "on_cpu", lambda accelerator: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert training_cost._devices_of(about) is None
    assert training_cost._devices_of({**about, "devices": 8}) == 8


def test_the_dry_runs_print_it(experiment, here, capsys):
    tiny.write(
        here,
        "ablations/two.yaml",
        "{title: Two, base: tiny, axes: {a: {one: {}, two: {seed: 1}}}}".replace("{seed: 1}", "{sampling.steps: 3}"),
    )
    assert __main__.main(["train", "tiny", "--dry-run"]) == 0
    assert "GFLOPs a step without frozen encoders; memory" in capsys.readouterr().out
    assert __main__.main(["ablate", "two", "--dry-run"]) == 0
    assert "1 trainings: " in capsys.readouterr().out


def test_an_adapter_alone_is_costed(here):
    pytest.importorskip("peft")
    tiny.write_experiment(here)
    whole, adapted = (
        training_cost.training_cost(experiments.load("tiny", words)) for words in ([], ["system.adapter=lora"])
    )
    assert 0 < adapted.trainable < whole.trainable / 2
    assert adapted.flops < whole.flops
    assert adapted.stages.state < whole.stages.state


def test_what_trains_of_an_autoencoder_is_costed_by_itself(here):
    """Also in one plan, where equal steps are measured once."""
    tiny.write_experiment(here, "squeeze", tiny.SQUEEZE)
    loaded = [experiments.load("squeeze", words) for words in ([], ["system.trains=head"])]
    with reusing():
        whole, head = map(training_cost.training_cost, loaded)
    assert head.flops < whole.flops


def test_memory_is_that_of_the_smallest_gpu(monkeypatch):
    monkeypatch.setattr(too_large, "_gpus", lambda: [2**30, 2**31])
    assert too_large.device_memory() == 2**30


def test_a_frozen_dit_costs_its_forward_and_the_gradient_of_its_inputs(experiment):
    """At most two of the three products of a matrix: none for the gradient of its weights, and the forward pass alone
    before the first cross-attention."""
    system = {**experiment["system"], "train_dit": False, "train_text": True}
    whole, frozen = (training_cost.training_cost({**experiment, "system": s}) for s in (experiment["system"], system))
    assert whole.flops / 3 < frozen.flops <= 2 / 3 * whole.flops
    assert 0 < frozen.trainable < whole.trainable
