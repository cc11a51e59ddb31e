"""Experiments in stages: what each stage is, and training of a cascade of resolutions and of DC-AE's three phases."""

from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

from sana_lab import __main__
from sana_lab.checkpoints import weights
from sana_lab.config import experiments, hashing, stages
from sana_lab.config.specs import SpecError
from sana_lab.training import checks, train

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader")  # mlflow 3.17 with sqlalchemy 2.1

CASCADE = """
base: tiny
trainer: {max_steps: 3}
stages:
  16: {data: {size: 16, batch: 8}}
  32:
    data: {size: 32, batch: 4}
    system: {shift: 6.0, dit: {position: sincos, base: 2, interpolation: 2.0}}
  last: {data: {size: 64, batch: 2}, trainer: {max_steps: 2}, seed: 4}
"""

PHASES = f"""
system: {{name: autoencoder, autoencoder: {tiny.DCAE}, warmup: 1, lr: 0.01}}
data: {{name: shapes, size: 16, batch: 64, held_out: 4}}
trainer: {{max_steps: 2, accelerator: cpu, threads: 1}}
stages:
  full: {{}}
  adapt: {{data: {{size: 32}}, system: {{trains: middle}}}}
  refine: {{data: {{size: 32}}, system: {{trains: head, adversarial: 0.1, discriminator_width: 4}}}}
"""


@pytest.fixture
def folder(here: Path) -> Path:
    tiny.write_experiment(here, changes={"prompts": []})
    tiny.write(here, "experiments/cascade.yaml", CASCADE)
    tiny.write(here, "experiments/phases.yaml", PHASES)
    return here


def test_each_stage_is_an_experiment_whose_parent_is_the_one_before(folder):
    first, second, last = (experiments.load(f"cascade@{stage}") for stage in (16, 32, "last"))
    assert experiments.stages_of("cascade") == ["cascade@16", "cascade@32", "cascade@last"]
    assert experiments.load("cascade") == last
    assert [s["data"]["size"] for s in (first, second, last)] == [16, 32, 64]
    assert [s["system"]["shift"] for s in (first, second, last)] == [3.0, 6.0, 3.0]  # each differs from the file alone
    assert [s["system"]["dit"]["interpolation"] for s in (first, second, last)] == [1.0, 2.0, 1.0]
    assert [s["trainer"]["max_steps"] for s in (first, second, last)] == [3, 3, 2]
    assert [s["parent"]["weights"] for s in (first, second, last)] == [
        None,
        "experiment:cascade@16",
        "experiment:cascade@32",
    ]
    assert experiments.prerequisites(last) == ["cascade@16", "cascade@32"]
    plain = experiments.load("tiny", ["data.size=16", "data.batch=8", "trainer.max_steps=3"])
    assert hashing.experiment_hash(first) == hashing.experiment_hash(plain)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cascade@16", ("cascade", "16")),
        ("dir/exp.yaml@16", ("dir/exp.yaml", "16")),
        ("/mnt/u@corp/exp.yaml", ("/mnt/u@corp/exp.yaml", None)),
        ("/mnt/u@corp/exp.yaml@16", ("/mnt/u@corp/exp.yaml", "16")),
        ("me@home.yaml", ("me@home.yaml", None)),
        ("cascade", ("cascade", None)),
    ],
)
def test_a_path_may_hold_the_sign(name, expected):
    assert stages.split(name) == expected


def test_a_change_of_the_first_stage_is_another_last_one(folder):
    before = hashing.experiment_hash(experiments.load("cascade"))
    tiny.write(folder, "experiments/cascade.yaml", CASCADE.replace("size: 16, batch: 8", "size: 16, batch: 4"))
    assert hashing.experiment_hash(experiments.load("cascade", ["trainer.log_every=7"])) != before


def test_a_file_may_build_on_one_with_stages_or_on_a_stage(folder):
    tiny.write(folder, "experiments/more.yaml", "base: cascade\nseed: 2\nstages: {last: {seed: 9}, end: {seed: 3}}\n")
    assert experiments.stages_of("more") == ["more@16", "more@32", "more@last", "more@end"]
    assert [experiments.load(stage)["seed"] for stage in experiments.stages_of("more")] == [2, 2, 9, 3]
    tiny.write(folder, "experiments/one.yaml", "base: cascade@32\nseed: 5\n")
    one = experiments.load("one")
    assert (one["data"]["size"], one["seed"], one["parent"]["weights"]) == (32, 5, "experiment:cascade@16")
    assert experiments.stages_of("one") == []


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("cascade@23", CASCADE, "experiment 'cascade' has no stage '23'; did you mean '32'"),
        ("tiny@16", CASCADE, "experiment 'tiny' has no stages, and tiny@16 names one; expected 'tiny'"),
        ("cascade", "base: tiny\nstages: [16, 32]\n", "expected a mapping from a name to what differs in it"),
        ("cascade", "base: tiny\nstages: {a@b: {}}\n", "expected a name without @"),
        ("cascade", "base: tiny\nstages: {a: 3}\n", "stage 'a' of 'cascade' is 3"),
        ("cascade", "base: tiny\nstages: {a: {dat: {size: 16}}}\n", "has no option 'dat'; did you mean 'data'"),
    ],
)
def test_what_is_wrong_is_said(folder, name, text, words):
    tiny.write(folder, "experiments/cascade.yaml", text)
    with pytest.raises(SpecError, match=words):
        experiments.load(name)


def test_one_command_trains_all_stages_and_resumes_in_any(folder, runs, monkeypatch, capsys):
    fit, sizes = train._fit, []

    def stopping(trainer, system, data, checkpoint):
        sizes.append(data.size)
        fit(trainer, system, data, checkpoint)
        if len(sizes) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "_fit", stopping)
    assert __main__.main(["train", "cascade"]) == 130
    assert __main__.main(["train", "cascade"]) == 0
    assert sizes == [16, 32, 32, 64]  # the first is not trained again
    card = weights.card(weights.find_trained(experiments.load("cascade"), "cascade"))
    assert card["parent"]["experiment"] == "cascade@32"
    capsys.readouterr()
    assert __main__.main(["train", "cascade", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "# stage cascade@16: 3 steps, trained\n" in said
    assert "# stage cascade@last: 2 steps, trained\n" in said
    assert __main__.main(["sample", "a red circle", "--model", "cascade@32", "--out", "images"]) == 0


def test_the_three_phases_of_an_autoencoder(folder, runs):
    """Each changes its layers alone, and the last one neither latents nor their normalisation."""
    assert __main__.main(["train", "phases"]) == 0
    full, adapt, refine = (
        weights.read(weights.find_trained(experiments.load(name), name)) for name in experiments.stages_of("phases")
    )
    middle = ("encoder.stages.2.", "encoder.head.", "decoder.stem.", "decoder.stages.2.", "shift", "scale")
    assert changed(full, adapt) == under(full, middle)
    assert changed(adapt, refine) == under(full, ("decoder.stages.1.", "decoder.norm.", "decoder.head."))


def changed(a: dict[str, Tensor], b: dict[str, Tensor]) -> set[str]:
    assert a.keys() == b.keys()
    return {name for name in a if not torch.equal(a[name], b[name])}


def under(names: dict[str, Tensor], prefixes: tuple[str, ...]) -> set[str]:
    return {name for name in names if name.removeprefix("autoencoder.").startswith(prefixes)}


@pytest.mark.parametrize("kind", [tiny.VAE, tiny.DCAE])
def test_layers_are_of_the_network_and_apart(kind):
    autoencoder = tiny.autoencoder(kind)
    parts = [[id(p) for m in autoencoder.layers(which) for p in m.parameters()] for which in ("middle", "head")]
    own = {id(p) for p in autoencoder.parameters()}
    assert all(set(part) < own and len(part) == len(set(part)) > 0 for part in parts)
    assert not set(parts[0]) & set(parts[1])


@pytest.mark.parametrize("name", ["sana_600m_cascade", "dcae_f32c32_phases"])
def test_stages_that_ship_are_right(here, name):
    for stage in experiments.stages_of(name):
        checks.check(experiments.load(stage))
