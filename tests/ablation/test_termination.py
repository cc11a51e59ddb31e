"""SIGTERM in a sweep: workers write a checkpoint and end, and their jobs are done again from there."""

import io
import os
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from rich.console import Console

from sana_lab.ablation import plan, quality, runner, worker
from sana_lab.ablation.executors import remote, slurm
from sana_lab.ablation.executors.local import Local
from sana_lab.ablation.executors.warm import WarmWorker
from sana_lab.ablation.jobs import Jobs, for_worker
from sana_lab.ablation.pool import RESTARTS, WorkerPool
from sana_lab.ablation.progress import ProgressBar
from sana_lab.ablation.protocol import Job
from sana_lab.ablation.trials import records
from sana_lab.tracking.store import Store
from sana_lab.training import train
from sana_lab.training.terminated import Terminated

pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:DeprecationWarning"  # mlflow 3.17 with sqlalchemy 2.1
)

ABLATION = f"""
title: One
base: tiny
common: {{system.optimizer: '{__name__}:Terminate', prompts: []}}
axes: {{attention: {{linear: {{}}}}}}
"""


class Terminate(torch.optim.SGD):
    """A signal at the step `at`, if it is not 0."""

    at, number = 0, signal.SIGTERM

    def step(self, closure: Any = None) -> Any:
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps == self.at and len(self.param_groups[0]["params"]) > 1:  # not in the contract's one matrix
            os.kill(os.getpid(), self.number)
        return super().step(closure)


@pytest.fixture
def folder(here: Path, runs: Path) -> Path:
    steps = {"trainer.max_steps": 8, "trainer.checkpoint_every": 100, "trainer.validate_every": 100}
    tiny.write_experiment(here, changes={"data.size": 16, "trainer.log_every": 1, **steps})
    tiny.write(here, "ablations/one.yaml", ABLATION)
    return here


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_worker_saves_its_step_and_the_job_goes_on_from_it(folder, monkeypatch, number):
    """SIGUSR2 is what Slurm sends before the time limit."""
    store = Store("runs")
    store.create("one")
    (record,) = records(store, plan.load("one"))
    run = store.start_run("one", record.trial.label, {"sana.kind": "trial", "sana.trial": record.key})
    trial = {"run": run, "key": record.key, "label": record.trial.label, **for_worker(record.trial)}
    job = Job("evaluate", "runs", torch.get_num_threads(), [trial])
    monkeypatch.setattr(worker, "exit_with_parent", lambda runner: None)
    monkeypatch.setattr(worker, "do_jobs", lambda: worker.do(job))
    monkeypatch.setattr(quality, "evaluate", lambda store, trial: None)
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR2)]
    monkeypatch.setattr(Terminate, "number", number)
    monkeypatch.setattr(Terminate, "at", 5)
    assert worker.main(os.getppid()) == 143
    home = train.folder(record.trial.config)
    assert [path.name for path in home.glob("*.ckpt")] == ["step=5.ckpt"]
    assert store.run(run).status == "RUNNING"
    monkeypatch.setattr(Terminate, "at", 0)
    assert worker.main(os.getppid()) == 0
    assert (home / "weights.safetensors").is_file()
    assert [step for step, _ in store.history(run, "train/loss")] == list(range(8))
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR2)] == handlers


class Statuses(Local):
    """Jobs end with these statuses, one after the other."""

    def __init__(self, *statuses: int) -> None:
        super().__init__(workers=1)
        self.statuses = list(statuses)
        self.end = ""

    def run(self, title: str, job: Job) -> int:
        return self.statuses.pop(0)

    def stop(self) -> None:
        self.end = self.end or "stop"

    def terminate(self) -> None:
        self.end = "terminate"


@pytest.mark.parametrize(
    ("statuses", "status", "rest"),
    [([143, -15, 0, 7], 0, 1), ([-9, 0], -9, 1), ([143] * (RESTARTS + 2), 143, 1)],
)
def test_a_job_whose_worker_was_terminated_is_done_again(tmp_path, statuses, status, rest):
    """Not one that was killed, and not without end."""
    executor, output = Statuses(*statuses), io.StringIO()
    pool = WorkerPool(tmp_path, ProgressBar("one", 10, console=Console(file=output)), executor)
    assert pool.run("linear", Job("evaluate", "runs", 1, [])) == status
    assert len(executor.statuses) == rest
    again = "linear: its worker was ended by SIGTERM; it goes on from its last checkpoint"
    assert output.getvalue().count(again) == len(statuses) - rest - 1


@pytest.mark.parametrize(("error", "end"), [(Terminated, "terminate"), (KeyboardInterrupt, "stop")])
def test_sigterm_gives_the_workers_time_and_ctrl_c_does_not(folder, monkeypatch, error, end):
    def raises(*_: object) -> None:
        raise error

    monkeypatch.setattr(Jobs, "evaluate", raises)
    executor = Statuses()
    with pytest.raises(error):
        runner.run(Store("runs"), plan.load("one"), executor)
    assert executor.end == end


SAVES = """
import pathlib, signal, sys, time
def save(*_):
    time.sleep(0.2)
    pathlib.Path(sys.argv[1]).write_text("saved")
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(30)
"""


@pytest.fixture
def saves(tmp_path: Path) -> Iterator[WarmWorker]:
    """A worker that writes a file on SIGTERM, and ends."""
    warm, pipe = WarmWorker({}), subprocess.PIPE
    command = [sys.executable, "-S", "-c", SAVES, str(tmp_path / "checkpoint")]
    warm.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    assert warm.process.stdout is not None
    assert warm.process.stdout.readline() == "ready\n"
    yield warm
    warm.close()


def test_workers_of_this_machine_may_save(saves, tmp_path):
    executor = Local(workers=1)
    executor.workers = [saves]
    executor.terminate()
    assert (tmp_path / "checkpoint").read_text() == "saved"
    assert saves.process.returncode == 143


@pytest.fixture
def task(saves: WarmWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[slurm.SlurmTask]:
    """A Slurm job whose worker is `saves`."""
    monkeypatch.setattr(remote, "_workers", {(): saves})
    before = signal.getsignal(signal.SIGTERM)
    yield slurm.SlurmTask(str(tmp_path), slurm.Submission(tmp_path / "job.json", tmp_path / "log", Future()))
    signal.signal(signal.SIGTERM, before)


def test_a_slurm_job_passes_sigterm_on_and_waits_for_its_end(task, saves, tmp_path, monkeypatch):
    """A preempted job that ended by itself would not be put into the queue again."""

    def run_job(*_: object) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        return saves.process.wait()

    naps: list[float] = []
    monkeypatch.setattr(slurm, "run_job", run_job)
    monkeypatch.setattr(slurm.time, "sleep", naps.append)
    assert task() == 143
    assert (tmp_path / "checkpoint").read_text() == "saved"
    assert naps == [slurm.GRACE]


def test_before_the_time_limit_a_slurm_job_is_submitted_again_with_a_checkpoint(task, saves, tmp_path, monkeypatch):
    helpers = types.ModuleType("submitit.helpers")
    helpers.DelayedSubmission = lambda function: ("again", function)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "submitit", types.ModuleType("submitit"))
    monkeypatch.setitem(sys.modules, "submitit.helpers", helpers)
    assert task.checkpoint() == ("again", task)
    assert (tmp_path / "checkpoint").read_text() == "saved"
    assert saves.process.returncode == 143
