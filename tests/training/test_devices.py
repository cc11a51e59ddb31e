"""Training on several devices: they share each batch and end with the model of one; the first alone records."""

import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch

from sana_lab.checkpoints import weights
from sana_lab.config import experiments, hashing
from sana_lab.config.validation import SpecError
from sana_lab.diffusion.sampling import generator
from sana_lab.shapes.data import Shapes
from sana_lab.systems.losses import velocity_losses
from sana_lab.tracking.store import Store
from sana_lab.training import divergence, parent, ranks, train
from sana_lab.types import Part

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader")  # mlflow 3.17 with sqlalchemy 2.1

AUTOENCODER = f"""
system: {{name: autoencoder, autoencoder: {tiny.VAE}, warmup: 2}}
data: {{name: shapes, size: 32, batch: 8, held_out: 4}}
trainer: {{max_steps: 4, accelerator: cpu, threads: 1, log_every: 1, validate_every: 2, checkpoint_every: 2}}
"""


@pytest.fixture
def folder(here: Path) -> Path:
    """Experiments `tiny` and `squeeze`."""
    tiny.write(here, "experiments/tiny.yaml", tiny.EXPERIMENT)
    tiny.write(here, "experiments/squeeze.yaml", AUTOENCODER)
    return here


def differences(a: Path, b: Path) -> float:
    """The largest difference of two weights files."""
    one, other = weights.read(a), weights.read(b)
    assert one.keys() == other.keys()
    return max(float((one[k] - other[k]).abs().max()) for k in one)


# The parts of a batch


def test_parts_are_the_rows_of_a_batch_in_order():
    data = Shapes(size=16, batch=6)
    whole = data.train_batch(3)
    parts = [data.train_batch(3, Part(rank, 3)) for rank in range(3)]
    assert whole.images is not None
    assert torch.equal(torch.cat([p.images for p in parts if p.images is not None]), whole.images)
    assert [prompt for p in parts for prompt in p.prompts] == whole.prompts


def test_parts_have_the_noise_and_times_of_their_rows():
    dit, flow, text = tiny.dit(), tiny.text2image().flow, tiny.caption([2, 3, 4, 1], dtype=torch.float32)
    latents = torch.randn(4, tiny.CHANNELS, 4, 4, generator=generator(1))
    whole = velocity_losses(dit, flow, latents, text, generator(2))
    halves = []
    for rank in range(2):
        rows = slice(2 * rank, 2 * rank + 2)
        part = type(text)(text.tokens[rows], text.mask[rows])
        halves.append(velocity_losses(dit, flow, latents[rows], part, generator(2), part=Part(rank, 2)))
    torch.testing.assert_close(torch.cat(halves), whole)


# How many


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.batch=5"], "data.batch 5 is not a multiple of 2; the nearest is 4"),
        (["system={name: clip}", "data.size=64"], "the loss of system 'clip' mixes the items of a batch; expected 1"),
        (
            ["system.method=contrastive"],
            "the term of method 'contrastive' mixes the items of a batch; expected 1",
        ),
        (["system.method=[direction, dispersive]"], "the term of method 'dispersive' mixes the items of a batch"),
        (
            ["system={name: autoencoder, autoencoder: vae, adversarial: 0.1}", "data.size=32"],
            "mixes the items of a batch; expected 1",
        ),
    ],
)
def test_what_cannot_be_shared_is_refused_at_once(folder, overrides, message):
    experiment = experiments.load("tiny", [*overrides, "trainer.devices=2"])
    with pytest.raises(SpecError, match=f"2 devices cannot share the training: .*{message}"):
        ranks.count(experiment)
    assert ranks.count(experiments.load("tiny", overrides)) == 1


def test_auto_is_as_many_devices_as_divide_the_batch(folder, monkeypatch):
    monkeypatch.setattr(ranks, "_available", lambda accelerator, elsewhere: 8)
    for batch, count in ((16, 8), (6, 6), (14, 7), (1, 1)):
        assert ranks.count(experiments.load("tiny", [f"data.batch={batch}"])) == count
    assert ranks.count(experiments.load("tiny", ["trainer.max_steps=0"])) == 1


def test_torchrun_with_another_number_is_refused(folder, monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SpecError, match=r"torchrun started 2 processes, and trainer\.devices is 4; expected auto"):
        ranks.count(experiments.load("tiny", ["trainer.devices=4"]))
    assert ranks.count(experiments.load("tiny", ["trainer.devices=2"])) == 2


# Two processes


def test_two_devices_train_the_model_of_one(folder, monkeypatch):
    """Their own processes, with gloo. The number of devices is not in the hash, so both have the same folder."""
    several = train.train(experiments.load("squeeze", ["trainer.devices=2"]), progress=print)
    monkeypatch.setattr(weights, "HOME", folder / "elsewhere")
    one = train.train(experiments.load("squeeze"), progress=print)
    assert differences(several, one) < 1e-3
    measured, expected = weights.card(several)["measured"], weights.card(one)["measured"]
    assert measured == pytest.approx(expected, rel=1e-3)
    assert [p.name for p in several.parent.glob("*.ckpt*")] == ["step=4.ckpt"]


def test_two_devices_begin_from_a_parent(folder):
    """Each process has the parent's weights, and the first alone writes what was taken."""
    train.train(experiments.load("tiny"), progress=print)
    words = ["parent.weights=experiment:tiny", "trainer.max_steps=2"]
    tuned = train.train(experiments.load("tiny", [*words, "trainer.devices=2"]), progress=print)
    assert weights.card(tuned)["parent"]["steps"] == 4
    assert (tuned.parent / parent.FILE).is_file()


def test_a_process_uses_the_device_at_its_place_of_a_list(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [ranks._own_device(devices) for devices in (2, "auto", "4,5", "4,5,")] == [1, 1, 5, 5]


def test_a_process_that_is_killed_is_an_error_with_its_status():
    receiver, sender = multiprocessing.Pipe(duplex=False)
    sender.close()
    assert str(ranks._error(receiver, -9)) == "a process of the training ended with status -9"


@pytest.mark.slow
def test_an_error_of_one_process_ends_all(folder):
    tiny.write(folder, "poison.py", POISON)
    poison = "system.optimizer={name: 'poison:Poison'}"
    with pytest.raises(divergence.Diverged, match="at step"):
        train.train(experiments.load("tiny", [poison, "trainer.devices=2"]), progress=print)
    assert weights.trained(experiments.load("tiny", [poison])) is None


POISON = '''
import torch

class Poison(torch.optim.SGD):
    """NaN weights after the first step."""

    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.data.fill_(float("nan"))
        return loss
'''


@pytest.mark.slow
def test_a_loss_of_one_process_is_the_cause_of_a_return_of_all(folder):
    """The first process, whose own loss is finite, records what ended the training."""
    tiny.write(folder, "sick.py", SICK)
    tiny.write(folder, "experiments/sick.yaml", tiny.EXPERIMENT.replace("name: text2image", "name: 'sick:Sick'"))
    words = ["trainer.devices=2", "trainer.returns=1"]
    (event,) = weights.card(train.train(experiments.load("sick", words), progress=print))["returns"]
    assert (event["cause"], event["batch"]) == ("the loss is nan", 2)


@pytest.mark.slow
def test_sigterm_at_the_verb_saves_a_checkpoint_of_its_processes(folder):
    tiny.write(folder, "endless.py", ENDLESS)
    options = ["trainer.devices=2", "trainer.max_steps=100000", "trainer.checkpoint_every=100000"]
    words = ["train", "tiny", *options, "trainer.validate_every=100000", "system.optimizer='endless:Endless'"]
    process = subprocess.Popen([sys.executable, "-m", "sana_lab", *words], stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 240
    while not (folder / "began").exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    process.terminate()  # the first process alone, as a shell's kill does
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 143, errors
    (checkpoint,) = (folder / "runs/models").glob("*/step=*.ckpt")
    assert int(checkpoint.stem.removeprefix("step=")) > 0


ENDLESS = '''
import pathlib
import torch

class Endless(torch.optim.SGD):
    """Says that it makes steps."""

    def step(self, closure=None):
        if len(self.param_groups[0]["params"]) > 1:  # not in the contract's one matrix
            pathlib.Path("began").touch()
        return super().step(closure)
'''


SICK = '''
import os

from sana_lab.systems.text2image import TextToImage

class Sick(TextToImage):
    """NaN on the second device, at the third batch."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if batch_idx == 2 and os.environ["RANK"] == "1" else loss
'''


def verb(*words: str, launcher: tuple[str, ...] = ()) -> str:
    """The stdout of `sana-lab`; the test fails where it does."""
    command = [sys.executable, "-m", *launcher, *(("-m",) if launcher else ()), "sana_lab", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_torchrun_and_the_verb_train_what_is_needed_and_record_it_once(folder, monkeypatch):
    words = ("train", "tiny", "system.autoencoder=experiment:squeeze", "trainer.devices=2")
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")
    assert verb(*words, launcher=torchrun).count("trained: runs/models") == 2  # of squeeze, then of tiny
    assert "is trained already" in verb(*words, launcher=torchrun)
    experiment = experiments.load("tiny", words[2:])
    model = {"sana.model": hashing.experiment_hash(experiment)}
    (run,) = Store("runs").find("training", model)
    assert run.status == "FINISHED"
    assert [step for step, _ in Store("runs").history(run.id, "train/loss")] == [0, 1, 2, 3]
    by_torchrun = weights.find_trained(experiment, "tiny")
    other = folder / "other"
    tiny.write(other, "experiments/tiny.yaml", tiny.EXPERIMENT)
    tiny.write(other, "experiments/squeeze.yaml", AUTOENCODER)
    monkeypatch.chdir(other)
    assert verb(*words).count("trained: runs/models") == 2
    assert differences(folder / by_torchrun, other / by_torchrun) < 1e-3
    (run,) = Store("runs").find("training", model)
    assert [step for step, _ in Store("runs").history(run.id, "train/loss")] == [0, 1, 2, 3]


@pytest.mark.slow
def test_trials_of_an_ablation_train_on_two_devices(folder):
    table = "title: Two\nbase: tiny\ncommon: {trainer.devices: 2}\naxes: {row: {one: {}, two: {system.ema: 0.5}}}\n"
    tiny.write(folder, "ablations/two.yaml", table)
    verb("ablate", "two")
    trials = [run for run in Store("runs").find("two") if run.parent]
    assert [run.status for run in trials] == ["FINISHED", "FINISHED"]
    assert all("val_loss" in run.metrics for run in trials)
