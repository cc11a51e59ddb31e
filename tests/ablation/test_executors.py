"""Executors: jobs on this machine, on a real Ray cluster of two nodes, and through submitit."""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny

from sana_lab.ablation import plan, runner
from sana_lab.ablation.executors import Executor, local, ray_cluster, within_reach
from sana_lab.ablation.executors.local import Local, device_groups
from sana_lab.ablation.executors.ray_cluster import RayCluster
from sana_lab.ablation.executors.slurm import Slurm
from sana_lab.ablation.executors.warm import WarmWorker
from sana_lab.ablation.protocol import End, Job, Progress
from sana_lab.ablation.trials import records
from sana_lab.checkpoints import weights
from sana_lab.config import specs
from sana_lab.config.specs import SpecError
from sana_lab.tracking.store import Store

pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:DeprecationWarning"  # mlflow 3.17 with sqlalchemy 2.1
)

PROBES = """
title: Attention
probe: {name: attention, tokens: 16, dim: 32, cross_heads: 2}
axes:
  batch:
    1: {batch: 1}
    2: {batch: 2}
columns: [softmax_core_ms]
repeats: 1
"""


def nothing(folder: Path) -> Job:
    """A job without trials."""
    return Job("measure", str(folder / "runs"), 1, [])


def do_both(executor: Executor, folder: Path) -> list[int]:
    """Status of two jobs that run at the same time."""
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(lambda title: executor.run(title, nothing(folder)), ("first", "second")))


NODES = [
    {"Alive": True, "Resources": {"CPU": 96.0, "memory": 1e11, "object_store_memory": 1e10, "node:10.0.0.1": 1.0}},
    {"Alive": True, "Resources": {"CPU": 64.0, "GPU": 8.0, "a100": 8.0, "memory": 1e11, "node:10.0.0.2": 1.0}},
    {"Alive": False, "Resources": {"CPU": 256.0, "GPU": 16.0}},
]
RAY = SimpleNamespace(is_initialized=lambda: True, nodes=lambda: NODES)
"""A cluster of Ray that answers."""


class TestSlots:
    def test_each_has_its_own_devices(self):
        ids = ["0", "1", "2", "3"]
        assert device_groups(ids, 1, 1) == [["0"], ["1"], ["2"], ["3"]]
        assert device_groups(ids, 2, 1) == [["0", "1"], ["2", "3"]]
        assert device_groups(ids[:2], 1, 2) == [["0"], ["1"], ["0"], ["1"]]
        assert device_groups([], 1, 1) == []

    def test_more_devices_than_there_are_are_refused(self):
        with pytest.raises(SpecError, match=r"executor.devices is 4, and this machine has 2; expected at most 2"):
            device_groups(["0", "1"], 4, 1)
        with pytest.raises(SpecError, match="per_device is 2, and a trial has 2 devices of its own"):
            device_groups(["0", "1"], 2, 2)

    def test_workers_see_those_of_their_slot(self, monkeypatch):
        monkeypatch.setattr(local, "device_ids", lambda: ["4", "5"])
        executor = Local(workers=3)
        assert [w.variables["CUDA_VISIBLE_DEVICES"] for w in executor.workers] == ["4", "5", "4"]
        assert (Local().slots, Local(devices=2).slots, Local(per_device=3).slots) == (2, 1, 6)

    def test_a_trial_that_asks_for_more_is_refused(self, here, monkeypatch):
        monkeypatch.setattr(local, "device_ids", lambda: ["0", "1"])
        tiny.write_experiment(here, changes={"trainer.devices": 2})
        tiny.write(here, "ablations/wide.yaml", "{title: Wide, base: tiny, axes: {a: {one: {}}}}")
        trials = plan.load("wide").trials
        with pytest.raises(SpecError, match=r"'one' has trainer.devices 2, and the executor gives a trial 1"):
            runner.check_devices(Local(), trials)
        runner.check_devices(Local(devices=2), trials)


class TestSpec:
    def test_the_file_and_the_command_line_choose(self, here):
        tiny.write(here, "ablations/probes.yaml", PROBES + "executor: {name: slurm, partition: gpu}\n")
        ablation = plan.load("probes")
        spec = runner.executor_of(ablation, None, None)
        assert (spec["name"], spec["partition"], spec["jobs"]) == ("slurm", "gpu", 64)
        assert runner.executor_of(ablation, "{name: ray, gpus: 0.5}", 7) | {"address": ""} == {
            **specs.resolve("executor", "ray"), "gpus": 0.5, "jobs": 7, "address": "",
        }  # fmt: skip
        with pytest.raises(SpecError, match="no executor is called 'slrm'; did you mean 'slurm'"):
            runner.executor_of(ablation, "slrm", None)

    def test_a_fraction_above_one_device_is_refused(self):
        with pytest.raises(SpecError, match=r"executor.gpus is 1.5, expected a fraction below 1"):
            RayCluster(gpus=1.5)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"gpus": 16}, r"asks for GPU 16, CPU 1 a trial, and the largest node of the cluster has GPU 8, CPU 64; "),
            ({"cpus": 200}, r"asks for CPU 200 a trial, and the largest node of the cluster has CPU 96; expected at"),
            ({"gpus": 1, "cpus": 96}, r"asks for GPU 1, CPU 96 a trial, and the largest .* has GPU 8, CPU 64;"),
            ({"resources": {"a10": 1}}, r"executor.resources has 'a10', which no node .* has; did you mean 'a100'"),
            ({"resources": {"a100": 9}}, r"asks for a100 9, CPU 1 a trial, and the largest .* has a100 8, CPU 64;"),
        ],
    )
    def test_what_no_node_of_ray_has_is_refused(self, monkeypatch, options, message):
        """Else Ray would wait for it without end."""
        monkeypatch.setattr(ray_cluster, "import_ray", lambda: RAY)
        with pytest.raises(SpecError, match=message):
            RayCluster(**options).check()
        RayCluster(**options, autoscaling=True).check()

    def test_what_a_node_of_ray_has_is_not(self, monkeypatch):
        monkeypatch.setattr(ray_cluster, "import_ray", lambda: RAY)
        for options in ({}, {"gpus": 8, "cpus": 64, "resources": {"a100": 8}}, {"gpus": 0.5}, {"cpus": 96}):
            RayCluster(**options).check()

    def test_options_that_the_executor_sets_are_refused(self):
        with pytest.raises(SpecError, match=r"executor.sbatch sets 'array'"):
            Slurm(sbatch={"array": "1-4"})

    @pytest.mark.parametrize(
        ("package", "executor", "extra"), [("ray", RayCluster, "ray"), ("submitit", Slurm, "slurm")]
    )
    def test_a_missing_package_names_its_extra(self, monkeypatch, package, executor, extra):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=rf"pip install 'sana_lab\[{extra}\]'"):
            executor().check()

    def test_slurm_is_looked_for_before_any_work(self, monkeypatch):
        pytest.importorskip("submitit", reason="submitit is not installed")
        monkeypatch.setattr(shutil, "which", lambda name: None)
        with pytest.raises(ValueError, match="needs sbatch, which is not on this machine"):
            Slurm().check()


def test_what_does_not_answer_is_out_of_reach():
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"the cluster cannot be reached: no answer in 0.2 s"):
        within_reach("the cluster", lambda: time.sleep(5), seconds=0.2)
    assert time.monotonic() - start < 2
    with pytest.raises(ValueError, match="cannot be reached: refused"):
        within_reach("it", lambda: (_ for _ in ()).throw(OSError("refused")))


def test_ends_of_jobs_are_told_from_other_lines(capsys):
    End(0, retires=True).send()
    Progress(3, "training").send()
    end, other = capsys.readouterr().out.splitlines()
    assert End.parse(end) == End(0, retires=True)
    assert [End.parse(line) for line in (other, "= 0", "= x 1", "= 0 7")] == [None] * 4


@pytest.mark.slow
class TestWarmWorker:
    @pytest.fixture
    def worker(self) -> Iterator[WarmWorker]:
        worker = WarmWorker({"OMP_NUM_THREADS": "1"})
        yield worker
        worker.close()

    def run(self, worker: WarmWorker, folder: Path, job: Job) -> tuple[int, int | None]:
        """Status, and the process that did it."""
        job.write(folder / "job.json")
        status = worker.run(folder / "job.json", folder / "log", lambda line: None)
        return status, worker.process.pid if worker.process else None

    def test_one_process_does_all_jobs_until_one_dies(self, worker, tmp_path):
        status, first = self.run(worker, tmp_path, nothing(tmp_path))
        begin = time.monotonic()
        assert (status, *self.run(worker, tmp_path, nothing(tmp_path))) == (0, 0, first)
        assert time.monotonic() - begin < 3  # imports are not paid again
        assert not (tmp_path / "job.json").exists()
        worker.kill()
        assert self.run(worker, tmp_path, nothing(tmp_path))[0] in (-9, 0)  # the killed one, or the next
        assert self.run(worker, tmp_path, nothing(tmp_path))[0] == 0

    def test_a_job_that_cannot_be_read_is_a_status_with_its_error_in_the_log(self, worker, tmp_path):
        (tmp_path / "job.json").write_text("{")
        assert worker.run(tmp_path / "job.json", tmp_path / "log", lambda line: None) == 1
        assert "JSONDecodeError" in (tmp_path / "log").read_text()


def sweep(here: Path, executor: Executor) -> list[str]:
    """The states of the trials of a sweep of probes."""
    tiny.write(here, "ablations/probes.yaml", PROBES)
    ablation = plan.load("probes")
    executor.check()
    runner.run(store := Store(weights.HOME), ablation, executor)
    return [r.run.status if r.run else "missing" for r in records(store, ablation)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a Ray cluster of two nodes with a CPU each."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'sana_lab[ray]'")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster.address
    cluster.shutdown()


@pytest.mark.slow
class TestRay:
    def test_a_sweep_is_complete(self, here, cluster):
        assert sweep(here, RayCluster(address=cluster)) == ["FINISHED"] * 2

    def test_jobs_run_on_both_nodes_at_once(self, here, cluster):
        import ray

        executor = RayCluster(address=cluster)
        executor.check()
        executor.start(here / "sweep", print)
        assert {n["Alive"] for n in ray.nodes()} == {True}
        assert len(ray.nodes()) == 2
        assert do_both(executor, here) == [0, 0]
        executor.close()
        assert list((here / "sweep").glob("*.json")) == []

    def test_one_out_of_reach_fails_soon(self):
        pytest.importorskip("ray", reason="Ray is not installed: pip install 'sana_lab[ray]'")
        begin = time.monotonic()
        with pytest.raises(ValueError, match=r"the Ray cluster '127.0.0.1:1' \(executor.address\) cannot be reached"):
            RayCluster(address="127.0.0.1:1").check()
        assert time.monotonic() - begin < 11


@pytest.mark.slow
class TestSlurm:
    def test_a_sweep_through_submitit_is_complete(self, here):
        pytest.importorskip("submitit", reason="submitit is not installed: pip install 'sana_lab[slurm]'")
        assert sweep(here, Slurm(cluster="local")) == ["FINISHED"] * 2
        assert list((here / "runs/sweeps/probes").glob("*.json")) == []


def test_processes_of_a_slot_end_with_it(tmp_path):
    """Also before they have read anything."""
    executor = Local(workers=1)
    executor.start(tmp_path, print)
    worker = executor.workers[0]
    process = worker._started(tmp_path / "log")
    executor.close()
    assert isinstance(process, subprocess.Popen)
    assert process.returncode == -9
