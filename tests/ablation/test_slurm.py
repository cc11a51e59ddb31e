"""The executor `slurm` on a real Slurm of this host: preempted, requeued and cancelled trials."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import slurm_cluster
import tiny

from sana_lab.ablation import plan
from sana_lab.ablation.executors.slurm import in_queue
from sana_lab.ablation.trials import records
from sana_lab.checkpoints import weights
from sana_lab.tracking.store import Store

pytestmark = pytest.mark.slow

ABLATION = """
title: Two
base: tiny
common: {trainer.max_steps: 1200, trainer.checkpoint_every: 25, trainer.log_every: 25, trainer.validate_every: 600}
axes: {attention: {softmax: {system.dit.attention: softmax}, linear: {}}}
"""

EXECUTOR = "{name: slurm, cpus: 1, minutes: 10}"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    pytest.importorskip("submitit", reason="submitit is not installed: pip install 'sana_lab[slurm]'")
    with slurm_cluster.running(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment


@pytest.fixture
def sweep(here: Path, runs: Path, cluster: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A sweep of two trials that both train, each with a checkpoint."""
    tiny.write_experiment(here)
    tiny.write(here, "ablations/two.yaml", ABLATION)
    command = [sys.executable, "-m", "sana_lab", "ablate", "two", "--executor", EXECUTOR]
    out, err = subprocess.PIPE, subprocess.STDOUT
    with subprocess.Popen(command, env=cluster, cwd=here, stdout=out, stderr=err, text=True) as process:
        try:
            wait(lambda: len({p.parent for p in runs.glob("models/*/step=*.ckpt")}) == 2, process)
            yield process
        finally:
            process.kill()
            subprocess.run(["scancel", "--user=root"], env=cluster, check=False)


def wait(condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = 240) -> None:
    """Wait for a condition while the sweep runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        assert time.monotonic() < end, "too long"
        time.sleep(0.5)


def slurm(cluster: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=cluster, check=True, capture_output=True, text=True).stdout


def queue(cluster: dict[str, str]) -> dict[str, str]:
    """job -> state"""
    lines = slurm(cluster, "squeue", "--noheader", "--array", "--format=%i %T").splitlines()
    return dict(line.split() for line in lines)


def test_preempted_and_requeued_trials_go_on_and_the_table_is_complete(sweep, cluster, here, runs):
    """One by its node's failure, as `scontrol requeue`, the other by the signal before preemption."""
    first, second = sorted(queue(cluster))
    slurm(cluster, "scontrol", "requeue", first)
    slurm(cluster, "scancel", "--signal=USR2", second)
    preempted: set[str] = set()

    def ended() -> bool:
        for job, state in queue(cluster).items():
            if state == "PENDING" and job not in preempted:
                preempted.add(job)
                slurm(cluster, "scontrol", "update", f"jobid={job}", "StartTime=now")  # else in two minutes
        return sweep.poll() is not None

    end = time.monotonic() + 300
    while not ended() and time.monotonic() < end:
        time.sleep(0.5)
    output = sweep.stdout.read()
    assert sweep.returncode == 0, output
    assert {first, second} <= preempted
    trials = records(Store(weights.HOME), plan.load("two"))
    assert states() == ["FINISHED"] * 2
    assert len(list(runs.glob("models/*/weights.safetensors"))) == 2
    assert (runs / "tables/two/table.md").read_text().count("| softmax |") == 1
    resumed = [[step for step, _ in Store(weights.HOME).history(record.run_id, "train/loss")] for record in trials]
    assert all(steps == sorted(set(steps)) for steps in resumed)
    assert list((runs / "sweeps/two").glob("*.json")) == []
    assert "sacct" not in output
    assert "accounting" not in output


def test_a_cancelled_job_is_a_failed_trial(sweep, cluster, runs):
    """Without accounting: Slurm keeps no record of the job."""
    job = min(queue(cluster))
    slurm(cluster, "scancel", job)
    wait(lambda: in_queue_of(cluster, job) == set(), sweep)
    output, _ = sweep.communicate(timeout=300)
    assert sweep.returncode != 0
    logs = "".join(path.read_text() for path in (runs / "sweeps/two").glob("*.log"))
    assert logs.count(f"job {job} ended without a result: it was cancelled, or killed on its node") == 1
    assert output.count("failed: its process ended with status 1") == 1
    assert states() == ["FAILED", "FINISHED"]


def states() -> list[str]:
    """Of both trials' runs."""
    trials = records(Store(weights.HOME), plan.load("two"))
    return sorted(record.run.status if record.run else "missing" for record in trials)


def in_queue_of(cluster: dict[str, str], job: str) -> set[str] | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", cluster["SLURM_CONF"])
        return in_queue([job])
