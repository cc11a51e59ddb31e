"""`benchmarks/train_on_gpu.py`: rows as a list of trainings, worker processes that share it, and what comes back."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny

from sana_lab.ablation import plan, shipping
from sana_lab.checkpoints import weights
from sana_lab.config import experiments, hashing

FOLDER = Path(__file__).parent.parent / "benchmarks"

GRID = """
title: Three models
base: tiny
weights: grid
axes:
  model:
    untrained: {trainer.max_steps: 0}
    linear: {system.dit.attention: linear}
    softmax: {system.dit.attention: softmax}
    the same: {system.dit.attention: softmax, sampling.steps: 3}
    other autoencoder: {system.autoencoder: "experiment:squeeze"}
"""


@pytest.fixture
def lists(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`trainings` in a folder with an ablation of two seeds, one row of which needs an autoencoder."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weights, "HOME", Path("runs"))
    tiny.write_experiment(tmp_path)
    tiny.write(tmp_path, "experiments/squeeze.yaml", tiny.SQUEEZE)
    tiny.write(tmp_path, "ablations/grid.yaml", GRID)
    import trainings

    monkeypatch.setattr(trainings, "recipes", lambda: [("grid", None)])
    return trainings


def listed(trainings: Any, monkeypatch: pytest.MonkeyPatch, *only: str) -> Any:
    """The models of the grid, as if it were quickstart."""
    monkeypatch.setattr(trainings, "QUICKSTART", "grid")
    return trainings.listed((0, 1), only)


def work(folder: Path, trainings: Any, models: Any, **settings: Any) -> Path:
    """A folder as `_drive` makes it for its workers."""
    folder.mkdir()
    trainings.write(folder / "models.json", models)
    default = {"budget": 60.0, "end": time.time() + 60, "rehearse": None, "out": str(folder.parent / "out")}
    (folder / "settings.json").write_text(json.dumps(default | settings))
    return folder


def child(folder: Path, worker: str = "worker 0") -> list[dict[str, Any]]:
    """A worker's process, in this one: its lines."""
    import sections

    out = folder / "results.jsonl"
    sections.child(["train_on_gpu", worker, f"--out={out}", f"--work={folder}"])
    return sections.read(out) if out.exists() else []


def test_rows_are_listed_once_with_their_hashes_and_first_seeds_first(lists: Any, monkeypatch: pytest.MonkeyPatch):
    models = listed(lists, monkeypatch)
    names = [model.name for model in models]
    assert names[:2] == ["grid: linear, seed 0", "grid: softmax, seed 0"]
    assert names[3] == "squeeze"
    assert names[4:] == [f"grid: {row}, seed 1" for row in ("linear", "softmax", "other autoencoder")]
    assert models[1].others == ["grid: the same, seed 0"]
    assert models[2].needs == [models[3].hash]
    trials = {(t.label, t.seed): t for t in plan.load("grid", seeds=[0, 1], retrain=True).trials}
    for model in models:
        if model.name != "squeeze":
            row, seed = model.name.removeprefix("grid: ").split(", seed ")
            assert model.hash == hashing.experiment_hash(trials[row, int(seed)].config)
    assert [model.name for model in listed(lists, monkeypatch, "autoencoder, seed 1")] == [names[3], names[6]]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_options_of_a_device_change_no_hash(lists: Any, monkeypatch: pytest.MonkeyPatch, device: str):
    for model in listed(lists, monkeypatch):
        placed = lists.placed(model.config, device, device == "cuda")
        assert hashing.experiment_hash(placed) == model.hash
        assert placed["trainer"]["accelerator"] == device
        if "text_encoder" in placed["system"]:
            assert placed["system"]["text_encoder"]["pad_to_max"] == (device == "cuda")


def test_a_worker_trains_what_ablate_and_ship_look_for(
    lists: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Weights under the hashes of the ablation's models, as fp16 in `out`, and back from archives."""
    import archives
    import train_on_gpu

    models = listed(lists, monkeypatch, "seed 0")
    lines = child(work(tmp_path / "work", lists, models))
    ended = {line["model"]: line for line in lines if "file" in line}
    assert ended.keys() == {model.hash for model in models}
    assert json.loads(capsys.readouterr().out.splitlines()[0]) == {
        key: value for key, value in next(iter(ended.values())).items() if key != "section"
    }
    for trial in plan.load("grid", retrain=True).trials:
        assert (weights.trained(trial.config) is not None) == shipping.is_shippable(trial)
    full = {m.hash: weights.read(Path("runs/models", m.hash, "weights.safetensors")) for m in models}
    (tmp_path / "work/results.jsonl").rename(tmp_path / "out/results.jsonl")  # where `_drive` has it
    assert archives.pack(models, tmp_path / "out", tmp_path / "packed") == []
    Path("runs").rename("elsewhere")
    assert archives.take(tmp_path / "packed") == 0
    for model in models:
        path = weights.trained(model.config)
        assert path is not None
        assert weights.card(path)["hash"] == model.hash
        state = weights.read(path)
        assert all(state[k].equal(v.half() if v.is_floating_point() else v) for k, v in full[model.hash].items())
    table = train_on_gpu.table(models, lines).splitlines()
    assert len(table) == len(models) + 2
    assert table[-1] == "4 of 4 models trained"
    assert shipping.main("grid", out=tmp_path / "shipped") == 0


def test_a_budget_stops_a_model_and_the_others_go_on(lists: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    import train_on_gpu

    class Slow(train_on_gpu.Pace):
        def __call__(self, step: int, steps: int, text: str = "") -> None:
            self.first = self.first or (0, time.time() - 100)  # as if a step had taken 100 s
            super().__call__(min(step, steps - 1), steps)

    models = listed(lists, monkeypatch, "linear, seed 0", "autoencoder, seed 0")
    monkeypatch.setattr(train_on_gpu, "Pace", Slow)
    lines = child(work(tmp_path / "work", lists, models))
    reasons = {line["case"]: line["why"] for line in lines if "why" in line}
    assert reasons["grid: linear, seed 0"] == "stopped at step 3 of 4, after 100 s of training"
    assert reasons["grid: other autoencoder, seed 0"] == "needs squeeze, which was not trained"
    assert train_on_gpu.table(models, lines).endswith("0 of 3 models trained")


def test_what_raises_costs_its_own_model(lists: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    import train_on_gpu

    models = listed(lists, monkeypatch, "linear", "softmax, seed 0")
    broken = models[0]._replace(config=experiments.merge(models[0].config, {"system": {"optimizer": {"lr": 1e30}}}))
    lines = child(work(tmp_path / "work", lists, [broken, *models[1:]]))
    assert [line["case"] for line in lines if "error" in line] == [broken.name]
    assert train_on_gpu.table([broken, *models[1:]], lines).endswith("2 of 3 models trained")


def test_claims_are_of_one_worker_and_wait_for_what_they_need(
    lists: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    models = listed(lists, monkeypatch, "seed 0")
    board, other = (lists.Board(tmp_path, models) for _ in range(2))
    names = [each.claim("a").name for each in (board, other, board)]
    assert names == ["grid: linear, seed 0", "grid: softmax, seed 0", "squeeze"]
    assert board.claim("b") is None
    assert not other.can_claim()
    assert [model.name for model in other.unclaimed()] == ["grid: other autoencoder, seed 0"]
    board.close("a")  # its process was stopped
    assert board.is_trained(models[3].hash) is False
    assert other.claim("b").name == "grid: other autoencoder, seed 0"


TOGETHER = """
import os, time
def context(rest): return None
def builders(section, context):
    return [work, crash, work] if section == "one" else [work, hang, work]
def label(build): return build.__name__
def work(): return {"done": time.time()}
def crash(): os._exit(7)
def hang(): time.sleep(600)
def run(build, context): yield build()
def is_usable(context): return True
"""


def test_sections_run_together_and_a_crash_or_hang_costs_its_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import sections

    (tmp_path / "together.py").write_text(TOGETHER)
    place = sections.Place("together", tmp_path / "out.jsonl", (), {"PYTHONPATH": str(tmp_path)})
    lines = sections.drive_together([sections.Section(name, 60, 2) for name in ("one", "two")], place)
    assert {line["error"][:13] for line in lines if "error" in line} == {"ended with st", "stopped after"}
    assert {name: sum("done" in line for line in lines if line["section"] == name) for name in ("one", "two")} == {
        "one": 2,
        "two": 2,
    }


def test_archives_have_room_for_first_seeds_and_name_the_rest(
    lists: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    import archives

    models = listed(lists, monkeypatch)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/results.jsonl").touch()
    for model in models:
        (tmp_path / f"out/{model.hash}.safetensors").write_bytes(bytes(2**19))
    monkeypatch.setattr(archives, "ARCHIVE_MIB", 1.2)
    monkeypatch.setattr(archives, "ARCHIVES", 2)
    lines = archives.pack(models, tmp_path / "out", tmp_path / "packed")
    assert [line.split(": /")[0] for line in lines] == [
        f"no room for grid: {row}, seed 1" for row in ("linear", "softmax", "other autoencoder")
    ]
    assert sorted(path.name for path in (tmp_path / "packed").iterdir()) == [
        "results.jsonl",
        "weights-0.tar",
        "weights-1.tar",
    ]


@pytest.mark.slow
def test_all_rows_train_ten_steps(tmp_path: Path):
    """Quickstart and the nine ablations, as on the day: worker processes, archives, table."""
    paths = os.pathsep.join(
        [str(tmp_path / "without"), str(FOLDER), str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]
    )
    words = [
        "--rehearse",
        "10",
        "--seeds",
        "0",
        "--workers",
        "2",
        "--seconds",
        "3000",
        "--out",
        "out",
        "--pack",
        "packed",
    ]
    command = [sys.executable, str(FOLDER / "train_on_gpu.py"), *words]
    process = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    ends = re.fullmatch(r"(\d+) of \1 models trained", process.stdout.splitlines()[-1])
    assert ends is not None
    assert int(ends[1]) >= 5 + 9  # quickstart's models, and one or more of each ablation
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == int(ends[1])
    assert not (tmp_path / "runs").exists()
