"""Rows that are trained within a time: after all others, alone with all cores, and named in the table."""

import io
import shutil
from pathlib import Path

import pytest
import tiny
from rich.console import Console

from sana_lab import environment
from sana_lab.ablation import plan, quality_table, runner, shipping
from sana_lab.ablation.executors.local import Local
from sana_lab.ablation.pool import WorkerPool
from sana_lab.ablation.progress import ProgressBar
from sana_lab.ablation.protocol import EVALUATION, MEASUREMENT, Job, Line
from sana_lab.ablation.record import EVALUATED
from sana_lab.ablation.trials import records
from sana_lab.checkpoints import weights
from sana_lab.tracking.store import Store

pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:DeprecationWarning"  # mlflow 3.17 with sqlalchemy 2.1
)

ROWS = """
title: Rows
base: tiny
axes:
  model:
    trained here (90 s): {trainer.max_seconds: 90, trainer.max_steps: 1000000}
    linear:
    softmax: {system.dit.attention: softmax}
columns: [train_samples, train_s]
"""


@pytest.fixture
def store(here: Path, empty_database: Path) -> Store:
    tiny.write_experiment(here)
    tiny.write(here, "ablations/rows.yaml", ROWS)
    (here / "runs").mkdir()
    shutil.copy(empty_database, here / "runs/mlflow.db")
    return Store(weights.HOME)


def test_they_come_last_and_have_the_machine(store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(environment, "cores", lambda: 6)
    jobs: list[tuple[str, int, list[str]]] = []

    def run(pool: WorkerPool, title: str, job: Job) -> int:
        jobs.append((job.kind, job.threads, [t["label"] for t in job.trials]))
        for trial in job.trials:
            numbers = {"train_steps": 812.0, "train_samples": 3248.0, "train_s": 90.4}
            store.log_metrics(trial["run"], numbers)
            store.set_tags(trial["run"], {EVALUATED: trial["key"]})
            if job.kind == "measure":
                store.finish(trial["run"])
        return 0

    monkeypatch.setattr(WorkerPool, "run", run)
    runner.run(store, plan.load("rows"), Local(workers=2))
    own = ["trained here (90 s)"]
    assert sorted(jobs[:2]) == [("evaluate", 3, ["linear"]), ("evaluate", 3, ["softmax"])]
    assert jobs[2:] == [("measure", 6, ["linear", "softmax"]), ("evaluate", 6, own), ("measure", 6, own)]
    (note,) = quality_table.budget_notes(records(store, plan.load("rows")))
    assert note.startswith("'trained here (90 s)' was trained here within 90 s, data preparation and pictures included")
    assert "812 steps, 3,248 samples" in note


def test_the_bar_counts_tenths_of_seconds(store: Store):
    trials = records(store, plan.load("rows"))
    with runner.progress("rows", trials, trials, []) as bar:
        assert bar.task.total == 900 + 2 * 4 + 3 * (EVALUATION + MEASUREMENT)


def test_they_are_not_shipped_and_their_time_is_known(store: Store):
    ablation = plan.load("rows")
    trials = records(store, ablation)
    assert [shipping.is_shippable(r.trial) for r in trials] == [False, True, True]
    lines = shipping.announce(ablation, trials, workers=2)
    assert lines[0] == "rows: 3 models to measure; weights of 0 ship, 3 to train from nothing."
    assert lines[-1] == "1 within a budget, 01:30 in all."


def test_lines_of_a_worker_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = io.StringIO()
    pool = WorkerPool(tmp_path, ProgressBar("rows", 100, console=Console(file=out)), Local(workers=1))
    Line("trained here (90 s): 30 of 90 s, 60 s left, step 4, loss 0.5").send()
    for line in ("some talk of a library\n", *capsys.readouterr().out.splitlines(True)):
        pool.show(line)
    assert out.getvalue() == "trained here (90 s): 30 of 90 s, 60 s left, step 4, loss 0.5\n"
    assert pool.bar.task.completed == 0
