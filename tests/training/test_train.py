"""Training: one model to a folder that its hash names; resumed after a kill, stopped at NaN, recorded in MLflow."""

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor

from sana_lab import __main__, api
from sana_lab.checkpoints import weights
from sana_lab.config import experiments, hashing, schema
from sana_lab.config.atomic_write import DiskFull
from sana_lab.config.specs import SpecError
from sana_lab.tracking.logger import RunLogger
from sana_lab.tracking.store import Store
from sana_lab.training import callbacks, checks, divergence, resume, train

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader")  # mlflow 3.17 with sqlalchemy 2.1


@pytest.fixture
def folder(here: Path) -> Path:
    """Two experiments, `tiny` and `squeeze`."""
    every = {"trainer.max_steps": 12, "trainer.checkpoint_every": 4, "trainer.validate_every": 4}
    tiny.write_experiment(here, changes={"data.size": 16, **every})
    tiny.write_experiment(here, "squeeze", tiny.SQUEEZE)
    return here


class Poison(torch.optim.SGD):
    """Leaves NaN behind from its `at`-th step on, as a step too long does."""

    def __init__(self, params: Any, lr: float = 0.01, at: int = 3) -> None:
        super().__init__(params, lr)
        self.at, self.steps = at, 0

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.steps += 1
        poisoned = self.steps >= self.at and len(self.param_groups[0]["params"]) > 1  # not in the contract's one matrix
        for group in self.param_groups if poisoned else ():
            for p in group["params"]:
                p.data.fill_(float("nan"))
        return loss


class Interrupt(torch.optim.SGD):
    """Ctrl-C at the fifth step."""

    def step(self, closure: Any = None) -> Any:
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps == 5:
            raise KeyboardInterrupt
        return super().step(closure)


@pytest.fixture
def ctrl_c():
    """Lightning replaces what Ctrl-C does."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def poisoned(at: int, **trainer: int) -> schema.Config:
    given = [f"trainer.{k}={v}" for k, v in trainer.items()]
    return experiments.load("tiny", [f"system.optimizer={{name: '{__name__}:Poison', at: {at}}}", *given])


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def test_leaves_weights_with_their_card(folder):
    experiment = experiments.load("tiny")
    told = []
    path = train.train(experiment, name="tiny", progress=lambda step, steps, text: told.append((step, steps, text)))
    card = weights.card(path)
    assert path == weights.trained(experiment)
    assert (card["experiment"], card["hash"]) == ("tiny", hashing.experiment_hash(experiment))
    assert (card["seed"], card["steps"]) == (0, 12)
    assert card["measured"].keys() >= {"train/loss", "val/loss", "val/loss_t3"}
    assert [(step, steps) for step, steps, _ in told] == [(10, 12), (12, 12)]
    assert re.fullmatch(r"step 10 of 12, loss \d\.\d{3}, \d+ s left", told[0][2])
    assert experiments.complete(experiments.read(path.parent / "experiment.yaml")) == experiment
    assert api.load("tiny").average.updates == 0
    written = path.stat().st_mtime_ns
    assert train.train(experiment) == path
    assert path.stat().st_mtime_ns == written


def test_what_only_samples_or_judges_trains_nothing_new(folder):
    path = train.train(experiments.load("tiny"))
    changes = ["sampling.steps=50", "eval.seed=1", "trainer.log_every=7", "trainer.threads=2"]
    assert train.train(experiments.load("tiny", changes)) == path
    assert weights.trained(experiments.load("tiny", ["trainer.max_steps=13"])) is None
    assert weights.trained(experiments.load("tiny", ["seed=1"])) is None


def test_no_steps_are_an_untrained_model(folder):
    path = train.train(experiments.load("tiny", ["trainer.max_steps=0"]))
    assert weights.card(path)["steps"] == 0
    assert not list(path.parent.glob("*.ckpt"))


KILLED = """
import sys, time
from sana_lab.config import experiments
from sana_lab.tracking.logger import RunLogger
from sana_lab.tracking.store import Store
from sana_lab.training import train

def wait(step, steps, text):
    print("step", step, flush=True)
    time.sleep(600)

train.train(experiments.load("tiny", sys.argv[2:]), progress=wait, logger=RunLogger(Store("runs"), sys.argv[1]))
"""


@pytest.mark.parametrize("validate", [3, pytest.param(4, marks=pytest.mark.slow)])  # at 4 the checkpoint waits for it
def test_a_killed_training_ends_as_an_unbroken_one(folder, runs, monkeypatch, validate):
    """kill -9 at step 10, after the checkpoint of step 8: the same weights and measures, and no point lost."""
    store, every = Store(runs), f"trainer.validate_every={validate}"
    run = store.start_run("training", "tiny")
    command = [sys.executable, "-c", KILLED, run, every]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "step 10\n"
        process.kill()
    experiment = experiments.load("tiny", [every])
    home = train.folder(experiment)
    assert [p.name for p in home.glob("*.ckpt")] == ["step=8.ckpt"]
    assert weights.trained(experiment) is None
    began: list[int] = []
    resumed = train.train(experiment, progress=lambda step, *_: began.append(step), logger=RunLogger(store, run))
    monkeypatch.setattr(weights, "HOME", folder / "elsewhere")
    whole = train.train(experiment)
    assert same(weights.read(resumed), weights.read(whole))
    assert weights.card(resumed)["measured"] == weights.card(whole)["measured"]
    assert began == [10, 12]
    assert [step for step, _ in store.history(run, "train/loss")] == list(range(12))
    assert [step for step, _ in store.history(run, "val/loss")] == list(range(validate - 1, 12, validate))
    assert [p.name for p in home.glob("*.ckpt")] == ["step=12.ckpt"]


@pytest.mark.parametrize("name", ["tiny", "squeeze"])
def test_a_kill_before_the_weights_are_written_loses_no_measure(folder, monkeypatch, name):
    """Nothing is trained again, and what the end of training adds to a model is in the last checkpoint."""
    experiment = experiments.load(name, ["trainer.validate_every=2", "trainer.checkpoint_every=2"])
    with monkeypatch.context() as patch:
        patch.setattr(weights, "write", stop)
        with pytest.raises(Stop):
            train.train(experiment)
    steps: list[int] = []
    resumed = train.train(experiment, progress=lambda step, *_: steps.append(step))
    monkeypatch.setattr(weights, "HOME", folder / "elsewhere")
    whole = train.train(experiment)
    assert steps == []
    assert same(weights.read(resumed), weights.read(whole))
    assert weights.card(resumed)["measured"] == weights.card(whole)["measured"]
    assert any(key.startswith("val/") for key in weights.card(resumed)["measured"])


def test_steps_are_those_of_the_optimiser_in_every_option(folder):
    """With two batches for a step: validations, checkpoints and points of curves."""
    log = Points()
    steps = ["trainer.max_steps=5", "trainer.accumulate=2", "trainer.validate_every=2", "trainer.checkpoint_every=3"]
    home = train.train(experiments.load("tiny", steps), logger=log).parent
    assert [step for step, names in log.steps if "val/loss" in names] == [1, 3]
    assert [step for step, names in log.steps if "train/loss" in names] == [0, 1, 2, 3, 4]
    assert torch.load(home / "step=5.ckpt", weights_only=True)["global_step"] == 5


def test_lightning_advertises_nothing(folder, capfd):
    train.train(experiments.load("tiny"), progress=lambda *_: None)
    assert capfd.readouterr() == ("", "")


def test_in_a_slurm_job_lightning_takes_no_signal(folder, capfd, monkeypatch):
    """Of several tasks too, which are no ranks of this training."""
    for name, value in {"JOB_ID": "7", "NTASKS": "2", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_JOB_NAME", "sana")
    before = signal.getsignal(signal.SIGUSR1)
    train.train(experiments.load("tiny"), progress=lambda *_: None)
    assert capfd.readouterr() == ("", "")
    assert signal.getsignal(signal.SIGUSR1) == before


class Points(DummyLogger):
    """Steps and names of what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[int | None, set[str]]] = []

    def log_metrics(self, metrics, step=None):
        self.steps.append((step, set(metrics)))


def unfinished() -> tuple[schema.Config, Path]:
    """An experiment whose training was interrupted after the checkpoint of step 8, and its folder."""
    experiment = experiments.load("tiny")
    with pytest.raises(Stop):
        train.train(experiment, progress=stop)
    return experiment, train.folder(experiment)


class Stop(Exception):
    """Power is cut."""


def stop(*_: Any) -> None:
    raise Stop


def test_a_checkpoint_that_is_cut_short_gives_way_to_the_one_before(folder, capsys):
    experiment, home = unfinished()
    whole = home / "step=8.ckpt"
    cut = home / "step=9.ckpt"
    cut.write_bytes(whole.read_bytes()[:2000])
    assert resume.latest(home) == str(cut)
    assert resume.resumable(home) == str(whole)
    assert f"left out: {cut} is cut short" in capsys.readouterr().err
    whole.unlink()
    with pytest.raises(SpecError, match=f"no checkpoint in .* can be read; .* delete {cut}$"):
        train.train(experiment)
    cut.unlink()
    train.train(experiment)


def test_the_seconds_of_training_add_up_over_a_resume(folder, monkeypatch):
    _, home = unfinished()
    held = torch.load(home / "step=8.ckpt", weights_only=True)
    assert 0 < held["callbacks"]["Clock"]["seconds"] < 1000
    held["callbacks"]["Clock"]["seconds"] = 5000.0
    torch.save(held, home / "step=8.ckpt")
    path = train.train(experiments.load("tiny"))
    assert 5000 < weights.card(path)["seconds"] < 6000


def test_a_card_holds_all_that_rebuilds_the_system(folder):
    """Whatever the row of a table was called that trained it."""
    experiment = experiments.load("tiny", ["trainer.max_steps=0", "seed=3"])
    card = weights.card(train.train(experiment, name="+ a row"))
    assert experiments.complete(card["config"]) == experiment


def test_a_second_process_says_that_it_waits(folder, capsys):
    experiment = experiments.load("tiny", ["trainer.max_steps=0"])
    home = train.folder(experiment)
    home.mkdir(parents=True)
    with (home / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        timer = threading.Timer(1.0, fcntl.flock, (held, fcntl.LOCK_UN))
        timer.start()
        train.train(experiment, name="tiny")
    assert f"another process trains tiny in {home.absolute()}; waiting for it\n" in capsys.readouterr().err


def test_the_bar_shows_the_loss_of_the_last_logging_point(folder, monkeypatch):
    shown = []
    monkeypatch.setattr(
        callbacks.ProgressBar, "_update_metrics", lambda bar, *given: shown.append(bar.get_metrics(*given)["loss"])
    )
    train.train(experiments.load("tiny", ["trainer.log_every=5", "trainer.max_steps=7", "trainer.validate_every=100"]))
    assert len({*map(str, shown)}) == 2  # NaN before the first, then that of step 5
    assert str(shown[0]) == "nan"


class TestNan:
    def test_of_the_loss_names_step_and_last_good_checkpoint(self, folder):
        experiment = poisoned(6, checkpoint_every=2)
        with pytest.raises(
            divergence.Diverged, match=r"not finite at step 6; last good checkpoint: runs/.*/step=4\.ckpt"
        ):
            train.train(experiment)
        with pytest.raises(
            divergence.Diverged, match=r"the loss is nan at step 8; .* checkpoint: runs/.*/step=5\.ckpt"
        ):
            train.train(poisoned(7, checkpoint_every=5))

    def test_before_any_checkpoint(self, folder):
        with pytest.raises(divergence.Diverged, match="the loss is nan at step 3; last good checkpoint: none yet"):
            train.train(poisoned(2))

    @pytest.mark.parametrize("every", [4, 100])
    def test_no_checkpoint_and_no_weights_are_written_of_it(self, folder, every):
        """Whatever the steps at which losses are looked at, and if the last step was the bad one."""
        experiment = poisoned(12, checkpoint_every=every, log_every=5)
        with pytest.raises(divergence.Diverged, match="at step 12"):
            train.train(experiment)
        assert weights.trained(experiment) is None
        kept = resume.latest(train.folder(experiment))
        if every == 4:
            held = torch.load(str(kept), weights_only=True)
            assert held["global_step"] == 8
            assert all(v.isfinite().all() for v in held["state_dict"].values())
        else:
            assert kept is None


@pytest.mark.parametrize("at", [5, 8])
def test_a_terminated_run_is_killed_and_goes_on_as_the_same_run(folder, runs, capsys, at):
    """SIGTERM in a step of the verb, also in one with a validation; the next command goes on from it."""
    words = ["train", "tiny", f"system.optimizer={__name__}:Terminate", "trainer.gradient_clip=2.0"]
    Terminate.at = at
    assert __main__.main(words) == 143
    store = Store("runs")
    (killed,) = store.find("training")
    assert killed.status == "KILLED"
    experiment = experiments.load("tiny", words[2:])
    home = train.folder(experiment)
    assert [p.name for p in home.glob("*.ckpt*")] == [f"step={at}.ckpt"]
    Terminate.at = 0
    assert __main__.main(words) == 0
    (run,) = store.find("training")
    assert (run.id, run.status) == (killed.id, "FINISHED")
    assert [step for step, _ in store.history(run.id, "train/loss")] == list(range(12))
    assert [step for step, _ in store.history(run.id, "val/loss")] == [3, 7, 11]
    assert [p.name for p in home.glob("*.ckpt*")] == ["step=12.ckpt"]
    trained = weights.read(home / "weights.safetensors")
    (home / "weights.safetensors").unlink()
    (home / "step=12.ckpt").unlink()
    assert same(trained, weights.read(train.train(experiment)))


class Terminate(torch.optim.SGD):
    """SIGTERM at the step `at`, if it is not 0."""

    at = 0

    def step(self, closure: Any = None) -> Any:
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps == self.at and len(self.param_groups[0]["params"]) > 1:  # not in the contract's one matrix
            os.kill(os.getpid(), signal.SIGTERM)
        return super().step(closure)


def test_a_full_disk_is_one_line_and_a_rerun_goes_on(folder, monkeypatch, capsys):
    """No room for the second checkpoint: the first is whole, and nothing else is left."""
    experiment = experiments.load("tiny")
    home, save, calls = train.folder(experiment), torch.save, []

    def full(content: Any, path: Path) -> None:
        calls.append(path)
        save(content, path)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(
            DiskFull, match=r"the disk has no room for it: [\d,.]+ MiB are free in .*; free some and run it again"
        ) as error:
            train.train(experiment)
    assert error.value.filename == str(home / "step=8.ckpt")
    assert [p.name for p in home.glob("*.ckpt*")] == ["step=4.ckpt"]
    steps: list[int] = []
    resumed = weights.read(train.train(experiment, progress=lambda step, *_: steps.append(step)))
    assert steps == [10, 12]
    monkeypatch.setattr(weights, "HOME", folder / "elsewhere")
    assert same(resumed, weights.read(train.train(experiment)))


def test_ctrl_c_is_a_keyboard_interrupt_and_may_be_pressed_again(folder, ctrl_c):
    experiment = experiments.load("tiny", [f"system.optimizer={__name__}:Interrupt", "trainer.gradient_clip=2.0"])
    with pytest.raises(KeyboardInterrupt):
        train.train(experiment)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert Path(str(resume.latest(train.folder(experiment)))).name == "step=4.ckpt"


def test_a_folder_that_cannot_be_written(folder):
    Path("runs").touch()
    with pytest.raises(
        ValueError, match=r"cannot write to .*/runs/models/\w+: .*; expected a folder that you can write"
    ):
        train.train(experiments.load("tiny"))


@pytest.mark.parametrize(
    ("size", "nearest"), [("20", "a multiple of 8 .*; the nearest is 16"), ("4", "the nearest is 8")]
)
def test_sizes_that_do_not_divide_are_refused_before_any_work(folder, size, nearest):
    for name in ("tiny", "squeeze"):
        with pytest.raises(SpecError, match=nearest):
            checks.check({**(e := experiments.load(name)), "data": {**e["data"], "size": int(size)}})


def test_the_verb_trains_what_is_needed_records_it_and_knows_it_again(folder, runs, capsys):
    words = ["train", "tiny", "system.autoencoder=experiment:squeeze"]
    assert __main__.main(words) == 0
    store = Store("runs")
    needed, run = (store.find("training", {"mlflow.runName": name})[0] for name in ("squeeze", "tiny"))
    assert (needed.status, run.status) == ("FINISHED", "FINISHED")
    assert run.params["system.dit.attention.name"] == "linear"
    assert run.tags["sana.model"] == hashing.experiment_hash(experiments.load("tiny", words[2:]))
    assert [step for step, _ in store.history(run.id, "val/loss")] == [3, 7, 11]
    assert len(store.history(run.id, "train/loss")) == 12
    capsys.readouterr()
    assert __main__.main(words) == 0
    said = capsys.readouterr().out
    assert "tiny is trained already: runs/models/" in said
    assert len(store.find("training")) == 2
    command = said.partition("as a new model: sana-lab ")[2].split()
    assert command == [*words, "--more", "N"]
    assert __main__.main([*command[:-1], "1", "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert "  resume: true\n" in planned
    assert "  max_steps: 13\n" in planned
    assert __main__.main([*words, "trainer.max_steps=0"]) == 0
    assert "tiny is trained with other steps: runs/models/" in capsys.readouterr().out
    assert __main__.main([*words, f"system.optimizer={__name__}:Poison"]) == 1
    failed = store.find("training")[0]
    assert failed.status == "FAILED"
    assert failed.tags["sana.error"].startswith("Diverged: the loss is nan at step 4; last good checkpoint: none yet")
    assert "the loss is nan" in capsys.readouterr().err
