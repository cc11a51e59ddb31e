"""Trainings that do not fit a machine: refused before any work, in a line that dry runs say too."""

from pathlib import Path

import pytest
import tiny
import two_processes

from sana_lab import __main__
from sana_lab.bench import fit, training_cost
from sana_lab.bench.fit import Training, memory_problem, needed_memory
from sana_lab.bench.training_cost import TrainingCost
from sana_lab.bench.training_memory import TrainingMemory
from sana_lab.checkpoints import weights
from sana_lab.config import experiments, specs
from sana_lab.config.specs import SpecError
from sana_lab.costs.too_large import GIB
from sana_lab.training import fits

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader")

SMALL = 2**20


def cost_of(
    process: float = 0.5, state: float = 0.5, step: float = 4.0, batch: int = 4, devices: int = 1
) -> TrainingCost:
    """A training of 10^9 parameters with so many GiB in each stage."""
    stages = TrainingMemory(*(int(GIB * size) for size in (process, state, step)), 0)
    return TrainingCost(10**9, 10**9, 1.0, stages, batch, 16 * 10**9, 10, None, "", devices)


@pytest.fixture
def folder(here: Path, runs: Path) -> Path:
    tiny.write_experiment(here)
    tiny.write(here, "ablations/two.yaml", "{title: Two, base: tiny, axes: {a: {one: {}, two: {data.batch: 2}}}}")
    return here


class TestMemory:
    def test_a_smaller_batch_is_named(self):
        problem = memory_problem([cost_of()], "large", int(3 * GIB))
        assert problem == (
            "large needs 5.0 GiB at data.batch 4, 1.0 GiB of them at any batch, and there are 3.0 GiB; what would fit: "
            "data.batch=2 with trainer.accumulate",
            True,
        )
        assert memory_problem([cost_of()], "large", int(5 * GIB)) is None

    def test_what_may_fit_is_not_refused(self):
        problem = memory_problem([cost_of()], "large", int(4 * GIB))
        assert problem is not None
        assert not problem.refused

    def test_fewer_at_a_time_are_named(self):
        problem = memory_problem([cost_of()] * 4, "large", int(10 * GIB))
        assert problem is not None
        assert problem.text.startswith("large needs 18.5 GiB at data.batch 4, with 4 trainings at a time, ")
        assert problem.text.endswith("what would fit: --workers 2")

    def test_a_smaller_system_is_named_where_no_batch_fits(self):
        problem = memory_problem([cost_of()] * 2, "large", GIB // 2)
        assert problem is not None
        assert problem.text.endswith("what would fit: a smaller system, or more devices")

    def test_devices_of_a_cpu_share_its_memory(self):
        assert needed_memory([cost_of(devices=2)]) == 9.5 * GIB
        problem = memory_problem([cost_of(devices=2)], "large", int(6 * GIB))
        assert problem is not None
        assert "at data.batch 8 on 2 devices, " in problem.text
        assert problem.text.endswith("data.batch=4 with trainer.accumulate")

    def test_gpus_have_their_own(self, monkeypatch):
        monkeypatch.setattr(fit.torch.cuda, "device_count", lambda: 2)
        costs = [cost_of(process=0)] * 3
        assert [needed_memory(costs[:n]) for n in (1, 2, 3)] == [4.5 * GIB, 4.5 * GIB, 9 * GIB]


class TestDisk:
    def test_it_is_that_of_weights_and_checkpoints(self, monkeypatch):
        trainings = [Training(name, cost_of(), {"name": "shapes"}) for name in "abc"]
        sizes = fit.bytes_to_write(trainings, 2)
        assert sizes == {weights.HOME: 3 * (4 + 16) * 10**9 + 2 * 16 * 10**9}
        assert fit.bytes_to_write([trainings[0]._replace(stored=10**9)], 1) == {weights.HOME: 35 * 10**9}
        monkeypatch.setattr(fit, "free_bytes", lambda path: 80 * GIB)
        assert fit.disk_problem(sizes, "three") == (
            "three writes 85.7 GiB, and 80.0 GiB are free in runs; what would fit: a smaller system, or a disk with "
            "more room (sana-lab du shows what could go)",
            True,
        )

    def test_caches_count_until_they_are_encoded(self, here):
        two_processes.write(here)
        data = specs.build("data", experiments.load("cached", ["data.source.shard=16"])["data"])
        latents, features = Path("runs/latents"), Path("runs/features")
        missing = data.bytes_to_write()
        assert missing.keys() == {latents, features}
        data.setup("fit")
        stored = {path: sum(p.stat().st_size for p in path.rglob("*.safetensors")) for path in missing}
        assert stored[latents] / 2 < missing[latents] <= stored[latents]
        assert 0 < missing[features] <= stored[features]
        assert data.bytes_to_write() == {latents: 0, features: 0}

    def test_a_cache_that_does_not_fit_is_refused(self, here, monkeypatch):
        two_processes.write(here)
        monkeypatch.setattr(fit, "free_bytes", lambda path: 2**20)
        experiment = experiments.load("cached", ["data.source.items=1000000"])
        with pytest.raises(SpecError, match=r"cached writes .* of them caches, .* `cache` of the data on another disk"):
            fits.check(experiment, "cached")
        assert not (here / "runs").exists()


class TestCommands:
    @pytest.fixture
    def small(self, folder, monkeypatch) -> Path:
        """A machine of 1 MiB."""
        monkeypatch.setattr(fit, "host_memory", lambda: SMALL)
        monkeypatch.setattr(fit, "device_memory", lambda: SMALL)
        return folder

    @pytest.mark.parametrize("words", [["train", "tiny"], ["ablate", "two"]])
    def test_they_refuse_before_any_work_what_their_dry_run_says(self, small, words, capsys):
        assert __main__.main(words) == 1
        (line,) = capsys.readouterr().err.splitlines()
        text = line.removeprefix("sana-lab: ").partition(" needs ")[0]
        assert text in ("tiny", "'one'")
        assert "and there are 0.0 GiB; what would fit: " in line
        assert line.endswith("; --force begins all the same")
        assert not (small / "runs/models").exists()
        assert __main__.main([*words, "--dry-run"]) == 0
        out = capsys.readouterr().out
        assert f"does not fit this machine: {text} needs " in out
        assert "disk in GiB: checkpoints and weights 0.0" in out

    def test_force_begins_all_the_same(self, small):
        assert __main__.main(["train", "tiny", "--force"]) == 0
        assert weights.trained(experiments.load("tiny")) is not None

    def test_what_is_trained_needs_nothing(self, small):
        experiment = experiments.load("tiny", ["trainer.max_steps=0"])
        assert fits.trainings(experiment, "tiny") == []

    def test_what_it_takes_weights_from_is_checked_too(self, here, monkeypatch):
        tiny.write_experiment(here, "squeeze", tiny.SQUEEZE)
        tiny.write_experiment(here, changes={"system.autoencoder": "experiment:squeeze"})
        monkeypatch.setattr(fit, "host_memory", lambda: SMALL)
        monkeypatch.setattr(training_cost, "_step_time", lambda *_: (None, ""))
        titles = [each.title for each in fits.trainings(experiments.load("tiny"), "tiny")]
        assert titles == ["squeeze", "tiny"]

    def test_a_sweep_elsewhere_is_not_measured_by_this_machine(self, small, capsys):
        assert __main__.main(["ablate", "two", "--dry-run", "--executor", "slurm"]) == 0
        assert "fit this machine" not in capsys.readouterr().out
