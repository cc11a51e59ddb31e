"""The whole road on tiny parts: an ablation -> trained once, evaluated, measured, recorded -> table and pictures."""

import csv
import io
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file

from sana_lab import __main__
from sana_lab.ablation import plan, runner, worker
from sana_lab.ablation.pool import WorkerPool
from sana_lab.ablation.protocol import Job
from sana_lab.ablation.record import TrialRecord
from sana_lab.ablation.trials import records
from sana_lab.checkpoints import weights
from sana_lab.config import hashing, schema
from sana_lab.tracking.store import Run, Store

pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:DeprecationWarning"  # mlflow 3.17 with sqlalchemy 2.1
)

ROAD = """
title: A short road
base: tiny
axes:
  model:
    linear:
    one step: {sampling.steps: 1}
    broken: {system.dit.attention: "guest:Broken"}
columns: [params_m, gmacs, tokens, latency_s, geneval, val_loss, train_s]
"""
GUEST = '''
import time
from pathlib import Path

import torch

from sana_lab.models.attention import Attention


class Broken(Attention):
    """Keeps its contract, which tries batches of 1 to 3, but does not train."""

    def __init__(self, head_dim: int = 32, *, dim: int) -> None:
        super().__init__(dim, head_dim, False)

    def mix(self, q, k, v):
        if len(q) > 3:
            raise RuntimeError("this attention is broken")
        return v


class Slow(Attention):
    """Takes its time, and notes each forward pass of training."""

    def __init__(self, head_dim: int = 32, seconds: float = 0.0, *, dim: int) -> None:
        super().__init__(dim, head_dim, False)
        self.seconds = seconds

    def mix(self, q, k, v):
        # the contract tries batches of 1 to 3, and costs are computed on the meta device
        if torch.is_grad_enabled() and len(q) > 3 and q.device.type != "meta":
            time.sleep(self.seconds)
            with Path(f"passes-{self.seconds}").open("a") as notes:
                notes.write("x")
        return v
'''


def write_recipes(folder: Path) -> None:
    """Everything that the ablation `road` needs, in the working directory."""
    tiny.write_experiment(folder, changes={"system.autoencoder.weights": "vae.safetensors"})
    tiny.write(folder, "ablations/road.yaml", ROAD)
    tiny.write(folder, "guest.py", GUEST)
    save_file(tiny.autoencoder().state_dict(), folder / "vae.safetensors")


class Road(NamedTuple):
    """The exit status of the first command, and what it wrote."""

    status: int
    store: Store
    trials: list[TrialRecord]
    parent: Run

    def run(self, label: str) -> Run:
        run = next(i.run for i in self.trials if i.trial.label == label)
        assert run is not None
        return run


def read_back(status: int) -> Road:
    store = Store(weights.HOME)
    trials = records(store, plan.load("road"))
    return Road(status, store, trials, store.find("road", {"sana.kind": "sweep"})[0])


def run_job(pool: WorkerPool, title: str, job: Job) -> int:
    """`WorkerPool.run`, but jobs of kind evaluate, two of the three, spare themselves the imports of a new process."""
    JOBS.append(job)
    if job.kind != "evaluate":
        return run_process(pool, title, job)
    with redirect_stdout(io.StringIO()) as out:
        worker.evaluate(Store(job.store), job.trials, threads=1)
    for line in out.getvalue().splitlines(True):
        pool.show(line)
    return 0


run_process = WorkerPool.run
JOBS: list[Job] = []
"""Of `road`, in the order of their starts."""


@pytest.fixture(scope="module")
def road(tmp_path_factory, empty_database) -> Iterator[Road]:
    """`sana-lab ablate road`, run once; costs are measured in a real worker process, as all is in the slow tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkerPool, "run", run_job)
        folder = tmp_path_factory.mktemp("road")
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        write_recipes(folder)
        (folder / "runs").mkdir()
        shutil.copy(empty_database, folder / "runs/mlflow.db")
        yield read_back(runner.main("road", workers=1))
        sys.modules.pop("guest", None)


def trained() -> dict[str, int]:
    """Model -> when its weights were written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in Path("runs/models").glob("*/weights.safetensors")}


def test_what_failed_is_told_by_the_exit_status_and_the_rest_is_done(road):
    assert road.status == 1
    assert [i.run.status for i in road.trials] == ["FINISHED", "FINISHED", "FAILED"]
    assert road.parent.status == "FAILED"
    assert road.run("broken").tags["sana.error"] == "RuntimeError: this attention is broken"


def test_a_model_is_trained_once_for_all_rows_that_share_it(road):
    assert len({i.model for i in road.trials}) == 2
    assert trained().keys() == {i.model for i in road.trials if i.trial.label != "broken"}
    assert len(road.store.history(road.run("linear").id, "train/loss")) == 4
    assert road.store.history(road.run("one step").id, "train/loss") == []
    labels = [sorted(trial["label"] for trial in job.trials) for job in JOBS]
    assert sorted(labels) == [["broken"], ["linear", "one step"], ["linear", "one step"]]


def test_every_finished_row_has_its_numbers(road):
    for label in ("linear", "one step"):
        run = road.run(label)
        assert 0 <= run.metrics["geneval"] <= 1
        assert run.metrics["tokens"] == 64
        assert run.metrics["params_m"] > 0
        assert run.metrics["latency_s"] > 0
        assert run.metrics["val_loss"] > 0
        assert run.metrics["train_s"] > 0
    assert road.run("linear").metrics["val_loss"] == road.run("one step").metrics["val_loss"]
    assert road.run("linear").metrics["params_m"] == road.run("one step").metrics["params_m"]


def test_mlflow_holds_a_parent_with_children_and_all_that_made_them(road):
    assert (road.parent.parent, road.parent.tags["sana.sweep"]) == (None, "road")
    for item in road.trials:
        run = item.run
        assert run is not None
        assert (run.parent, run.name, run.tags["label.model"]) == (road.parent.id, item.trial.label, item.trial.label)
        assert (run.tags["sana.trial"], run.tags["sana.model"]) == (item.key, item.model)
        assert run.tags.keys() >= {"torch", "python", "cpu", "commit", "sana.seed"}
        assert run.params["seed"] == str(item.trial.seed)
        assert {k: v for k, v in run.params.items() if k.startswith("axis.")} == {
            f"axis.{axis}": label for axis, label in item.trial.labels.items()
        }
        kept = OmegaConf.load(road.store.file(run.id, "config/resolved.yaml"))
        assert OmegaConf.to_container(kept) == item.trial.config
    linear = road.run("linear")
    assert [step for step, _ in road.store.history(linear.id, "val/loss")] == [1, 3]
    for name in ("report.json", "bench.json", "samples.npz", "images"):
        assert road.store.file(linear.id, name).exists()
    assert {p.name for p in road.store.file(road.parent.id, "table").iterdir()} >= {"table.md", "samples.png"}


def test_the_table_has_rows_and_a_hole_with_its_reason(road):
    folder = Path("runs/tables/road")
    text = (folder / "table.md").read_text()
    rows = {line.split("|")[1].strip(" *"): line for line in text.splitlines() if line.startswith("|")}
    assert rows.keys() >= {"linear", "one step"}
    assert "this attention is broken" in text
    with (folder / "table.csv").open(newline="") as file:
        table = list(csv.reader(file))
    assert len(table) == 1 + 3
    assert "this attention is broken" in " ".join(table[3])
    assert "linear" in (folder / "table.tex").read_text()
    pictures = sorted(path.name for path in folder.glob("*.png"))
    scores = [f"{score}{of}.png" for score in ("exact", "geneval") for of in ("", "_latency_s")]
    assert pictures == [*scores, "samples.png", "training_loss.png"]
    for picture in pictures:
        with Image.open(folder / picture) as image:
            assert min(image.size) > 50


def test_the_dry_run_knows_what_is_done(road, capsys):
    assert __main__.main(["ablate", "road", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[-1] for line in lines[:2]] == ["done"] * 2
    assert lines[2].endswith("failed: RuntimeError: this attention is broken")


def test_the_table_can_be_written_again_elsewhere(road, capsys, tmp_path):
    assert __main__.main(["table", "road", "--out", str(tmp_path / "t")]) == 0
    assert (tmp_path / "t/table.csv").read_text() == Path("runs/tables/road/table.csv").read_text()
    assert "this attention is broken" in capsys.readouterr().out


def test_a_copy_of_the_folder_keeps_its_results(road, capsys, tmp_path, monkeypatch):
    shutil.copytree(Path.cwd(), tmp_path / "copy")
    shutil.move(tmp_path / "copy", tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    assert __main__.main(["ablate", "road", "--dry-run"]) == 0
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:3]] == ["done"] * 2
    assert __main__.main(["table", "road", "--out", "again"]) == 0
    old = Path(road.store.home).parent / "runs/tables/road"
    assert Path("again/table.csv").read_text() == (old / "table.csv").read_text()
    assert {p.name for p in Path("again").iterdir()} == {p.name for p in old.iterdir()}  # pictures come from artifacts
    assert "road" in Store("runs").experiments()  # those that `ui` shows


def test_the_same_command_again_runs_nothing(road, capsys, monkeypatch):
    """Without the row that fails, which would be tried again."""
    before, runs = trained(), len(road.store.find("road"))
    Path("ablations/road.yaml").write_text("".join(line for line in ROAD.splitlines(True) if "broken" not in line))
    monkeypatch.setattr(sys, "executable", "/no/such/python")  # no worker could start
    assert runner.main("road", workers=1) == 0
    assert "road: all 2 trials are done" in capsys.readouterr().out
    assert (trained(), len(road.store.find("road"))) == (before, runs)
    Path("ablations/road.yaml").write_text(ROAD)


# --- killed in mid-sweep

SLOW = """
title: A slow road
base: tiny
common: {trainer.max_steps: 30}
axes:
  model:
    quick: {system.dit.attention: {name: "guest:Slow", seconds: 0.0}}
    slow: {system.dit.attention: {name: "guest:Slow", seconds: 0.3}}
columns: [geneval, latency_s]
"""


def workers(folder: Path) -> list[int]:
    """Processes of sana_lab.ablation.worker that work in this folder."""
    processes = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if b"sana_lab.ablation.worker" in (entry / "cmdline").read_bytes() and (entry / "cwd").readlink() == folder:
                processes.append(int(entry.name))
        except OSError:  # it has ended meanwhile
            continue
    return processes


def wait(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_killed_in_mid_sweep_the_same_command_ends_it(here):
    write_recipes(here)
    (here / "ablations/road.yaml").write_text(SLOW)
    command = [sys.executable, "-m", "sana_lab", "ablate", "road", "--workers", "1"]
    quick, slow = (hashing.experiment_hash(t.config) for t in trials_of(here))
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait(lambda: process.poll() is not None or list((here / "runs/models" / slow).glob("step=1?.ckpt")), 600)
        assert workers(here)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    wait(lambda: not workers(here), 60)

    before = trained()
    assert before.keys() == {quick}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert trained().keys() == {quick, slow}
    assert trained()[quick] == before[quick]
    assert len((here / "passes-0.0").read_text()) == 30
    assert (
        30 <= len((here / "passes-0.3").read_text()) <= 30 + 2 + 7
    )  # at most 2 steps since the checkpoint, 2 s till the end
    road = read_back(0)
    assert [i.run.status for i in road.trials] == ["FINISHED"] * 2
    assert road.parent.status == "FINISHED"
    assert len(road.store.find("road", {"sana.kind": "trial"})) == 2
    assert len(road.store.history(road.run("quick").id, "geneval")) == 1


def trials_of(folder: Path) -> list[schema.Trial]:
    sys.path.insert(0, str(folder))
    try:
        return plan.load("road").trials
    finally:
        sys.path.remove(str(folder))
