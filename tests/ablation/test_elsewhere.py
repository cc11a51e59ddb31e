"""Sweeps from a machine without a GPU to machines that have one: each checks what it has itself."""

from pathlib import Path

import pytest
import tiny
import torch

from sana_lab import __main__
from sana_lab.ablation import plan, runner, worker
from sana_lab.ablation.executors.local import Local
from sana_lab.ablation.executors.ray_cluster import RayCluster
from sana_lab.ablation.executors.slurm import Slurm
from sana_lab.ablation.pool import WorkerPool
from sana_lab.ablation.protocol import Job
from sana_lab.ablation.trials import records
from sana_lab.checkpoints import weights
from sana_lab.tracking.store import Store

pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),  # mlflow 3.17
    pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
]

ABLATION = """
title: One
base: tiny
axes: {attention: {linear: {}}}
"""

PROBES = """
title: Attention
probe: {name: attention, tokens: 16, dim: 32, cross_heads: 2}
axes: {batch: {1: {batch: 1}, 2: {batch: 2}}}
columns: [softmax_core_ms]
repeats: 1
"""


class Elsewhere(Local):
    """Stands for a cluster: jobs run in this process."""

    elsewhere = True

    def __init__(self, gpus: int = 0) -> None:
        super().__init__(workers=1)
        self.devices = gpus or None


@pytest.fixture
def folder(here: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def run(pool: WorkerPool, title: str, job: Job) -> int:
        worker.do(job)
        return 0

    monkeypatch.setattr(WorkerPool, "run", run)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    tiny.write_experiment(here, changes={"data.size": 16})
    tiny.write(here, "ablations/one.yaml", ABLATION)
    tiny.write(here, "ablations/probes.yaml", PROBES)
    return here


def ablate(recipe: str, *overrides: str, gpus: int = 0) -> int:
    executor = f"{{name: '{__name__}:Elsewhere', gpus: {gpus}}}"
    return __main__.main(["ablate", recipe, *overrides, "--executor", executor])


def test_clusters_are_other_machines():
    assert (Local().elsewhere, RayCluster().elsewhere) == (False, True)
    assert [Slurm(cluster=cluster).elsewhere for cluster in ("slurm", "local")] == [True, False]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.accelerator=gpu", "trainer.accelerator is 'gpu', which this machine does not have"),
        ("system.dit.attention={name: linear, backend: triton}", "has backend 'triton', which needs a CUDA device"),
    ],
)
def test_a_device_is_asked_for_where_the_trial_runs(folder, capsys, override, words):
    assert __main__.main(["ablate", "one", override]) == 1
    assert words in capsys.readouterr().err
    assert ablate("one", override, gpus=1) == 1
    (record,) = records(Store(weights.HOME), plan.load("one", [override]))
    assert record.run.status == "FAILED"
    assert words in record.run.tags["sana.error"]


def test_rows_are_timed_by_the_worker_and_known_again(folder, capsys, monkeypatch):
    """Not by the key of this machine's device, which may be another one."""
    assert ablate("probes") == 0
    monkeypatch.setattr(WorkerPool, "run", lambda *_: pytest.fail("a row is timed again"))
    assert ablate("probes") == 0
    assert "all 2 trials are done" in capsys.readouterr().out
    store, ablation = Store(weights.HOME), plan.load("probes")
    assert [record.run for record in records(store, ablation)] == [None, None]
    timed = records(store, ablation._replace(elsewhere=0))
    assert all("softmax_core_ms" in record.run.metrics for record in timed)
    (weights.HOME / "tables/probes/table.md").unlink()
    assert __main__.main(["table", "probes"]) == 0
    text = (weights.HOME / "tables/probes/table.md").read_text()
    assert f"Timed on {timed[0].run.tags['sana.timed_on']}, float32" in text


def test_a_worker_without_the_device_fails_and_does_not_count_alone(folder):
    """Else the rows would be done, and never timed."""
    assert ablate("probes", gpus=1) == 1
    failed = records(Store(weights.HOME), plan.load("probes")._replace(elsewhere=1))
    assert [record.run.status for record in failed] == ["FAILED"] * 2
    assert "has no CUDA device to time on" in failed[0].run.tags["sana.error"]


def test_the_environment_of_a_run_is_the_workers(folder, monkeypatch):
    monkeypatch.setattr(worker, "environment", lambda: {"cpu": "that of the node"})
    assert ablate("probes") == 0
    timed = records(Store(weights.HOME), plan.load("probes")._replace(elsewhere=0))
    assert {record.run.tags["cpu"] for record in timed} == {"that of the node"}


def test_a_dry_run_says_where_rows_are_timed(folder, capsys):
    executor = f"{{name: '{__name__}:Elsewhere', gpus: 1}}"
    assert __main__.main(["ablate", "probes", "--dry-run", "--executor", executor]) == 0
    assert "2 rows, timed on a CUDA device of the executor" in capsys.readouterr().out
    assert runner.efficiency.target_of(plan.load("probes").table, None).device == "cpu"
