"""Rows that come trained: weights are written, shipped, measured in place of training, and retrained on demand."""

import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file

from sana_lab import __main__
from sana_lab.ablation import packing, plan, quality, runner, shipping, worker
from sana_lab.ablation.pool import WorkerPool
from sana_lab.ablation.protocol import Job
from sana_lab.ablation.record import TrialRecord
from sana_lab.ablation.trials import records, state
from sana_lab.checkpoints import weights
from sana_lab.config import hashing
from sana_lab.config.specs import SpecError
from sana_lab.tracking.store import Store
from sana_lab.training import train

pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:DeprecationWarning"  # mlflow 3.17 with sqlalchemy 2.1
)

ROWS = """
title: Rows
base: tiny
axes:
  model:
    untrained: {trainer.max_steps: 0}
    linear:
    + one step: {sampling.steps: 1}
    softmax: {system.dit.attention: softmax}
weights: rows
columns: [params_m, geneval, train_samples, train_s]
"""


def run_job(pool: WorkerPool, title: str, job: Job) -> int:
    """`WorkerPool.run` in this process, which spares the imports of a new one."""
    job.write(pool.folder / f"{title}.json")
    store, trials = Store(job.store), Job.read(pool.folder / f"{title}.json").trials
    with redirect_stdout(io.StringIO()):
        if job.kind == "evaluate":
            worker.evaluate(store, trials, 1)
        for trial in trials if job.kind == "measure" else []:
            worker.measure(store, trial, None)
    return 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[Path]:
    """A folder where the rows have been retrained and their weights written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkerPool, "run", run_job)
        folder = tmp_path_factory.mktemp("rows")
        patch.chdir(folder)
        tiny.write_experiment(folder, changes={"system.autoencoder.weights": "vae.safetensors"})
        tiny.write(folder, "ablations/rows.yaml", ROWS)
        save_file(tiny.autoencoder().state_dict(), folder / "vae.safetensors")
        (folder / "runs").mkdir()
        shutil.copy(empty_database, folder / "runs/mlflow.db")
        assert runner.main("rows", workers=1, retrain=True) == 0
        assert shipping.main("rows") == 0
        shutil.move(folder / "runs/models", folder / "trained")
        yield folder


@pytest.fixture(scope="module")
def swept(folder: Path) -> dict[str, TrialRecord]:
    """The rows by label after the sweep that measures what ships."""
    with pytest.MonkeyPatch.context() as patch:
        fit = train.train

        def fit_nothing(experiment, **options):
            assert experiment["trainer"]["max_steps"] == 0, "it was trained"
            return fit(experiment, **options)

        patch.setattr(quality.train, "train", fit_nothing)
        assert runner.main("rows", workers=1) == 0
    return {r.trial.label: r for r in records(Store(weights.HOME), plan.load("rows"))}


class TestShip:
    def test_a_file_for_each_model_that_is_trained(self, folder: Path):
        names = sorted(path.name for path in Path("experiments/weights/rows").iterdir())
        assert names == ["linear.safetensors", "softmax.safetensors"]

    def test_it_holds_the_averaged_weights_as_fp16_without_frozen_parts(self, folder: Path):
        for path in Path("experiments/weights/rows").glob("*"):
            own, shipped = weights.card(path)["hash"], weights.read(path)
            trained = weights.read(Path("trained", own, "weights.safetensors"))
            assert {name.partition(".")[0] for name in shipped} == {"dit", "text_encoder"}
            assert shipped.keys() == trained.keys()
            for name, tensor in trained.items():
                assert shipped[name].dtype in (torch.float16, torch.int64)
                assert torch.equal(shipped[name], tensor.to(shipped[name].dtype))

    def test_the_card_says_what_trained_and_what_was_measured(self, folder: Path):
        card = weights.card(Path("experiments/weights/rows/linear.safetensors"))
        assert card["command"] == "sana-lab ablate rows --retrain"
        assert (card["seed"], card["steps"], card["samples"], card["dtype"]) == (0, 4, 16, "float16")
        assert card["seconds"] > 0
        assert card["environment"]["torch"] in torch.__version__
        assert card["rows"].keys() == {"linear", "+ one step"}
        assert all(0 <= measured["geneval"] <= 1 for measured in card["rows"].values())
        assert card["measured"]["val/loss"] > 0

    def test_rows_that_are_not_trained_here_are_named(self, folder: Path, capsys, tmp_path: Path):
        assert __main__.main(["ship", "rows", "--out", str(tmp_path)]) == 1
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == f"{tmp_path}: 0 files, 0.0 MB"
        assert lines[1].startswith("not trained here, not written: 'linear', '+ one step', 'softmax'; run: sana-lab")

    def test_files_that_no_row_uses_are_named(self, folder: Path, capsys, tmp_path: Path):
        path = tmp_path / "old.safetensors"
        weights.write(path, {"a": torch.zeros(500_000)}, {"hash": "old"})
        shipping.main("rows", out=tmp_path)
        lines = capsys.readouterr().out.splitlines()
        assert lines[:2] == [f"{tmp_path}: 1 files, 2.0 MB", f"no row uses {path}; delete it"]

    def test_weights_beyond_fp16_are_refused(self, tmp_path: Path):
        weights.write(tmp_path / "large.safetensors", {"dit.a": torch.tensor([1e6])}, {})
        with pytest.raises(SpecError, match=r"large\.safetensors as fp16"):
            shipping.write(tmp_path / "out.safetensors", tmp_path / "large.safetensors", {"seconds": 1.0})
        assert not (tmp_path / "out.safetensors").exists()

    @pytest.mark.parametrize(
        ("name", "text", "words"),
        [
            ("bare", ROWS.replace("weights: rows\n", ""), "ablation 'bare' names no folder of weights"),
            ("probes", "title: t\nprobe: {name: attention}\naxes: {a: {b: }}\ncolumns: []\n", "no weights to ship"),
        ],
    )
    def test_an_ablation_without_weights_is_refused(self, folder: Path, name: str, text: str, words: str):
        tiny.write(folder, f"ablations/{name}.yaml", text)
        with pytest.raises(SpecError, match=words):
            shipping.main(name)


def test_files_are_called_by_the_first_label_and_the_seed(folder: Path):
    tiny.write(folder, "ablations/seeds.yaml", ROWS.replace("weights: rows", "seeds: [0, 2]"))
    trials = records(Store(weights.HOME), plan.load("seeds", retrain=True))
    names = shipping.by_file([r for r in trials if shipping.is_shippable(r.trial)])
    assert [*names] == ["linear", "softmax", "linear_seed2", "softmax_seed2"]
    twins = [r._replace(model=model) for model in ("abcdef01", "12345678") for r in trials[1:2]]
    assert [*shipping.by_file(twins)] == ["linear", "linear_123456"]


class TestSweep:
    def test_rows_that_ship_are_measured_and_not_trained(self, swept: dict[str, TrialRecord]):
        assert [r.run.status for r in swept.values()] == ["FINISHED"] * 4
        assert list(Path("runs/models").glob("*/*.ckpt")) == []
        assert all(0 <= r.run.metrics["geneval"] <= 1 for r in swept.values())
        assert all(r.run.metrics["params_m"] > 0 for r in swept.values())

    def test_numbers_of_the_training_are_the_cards(self, swept: dict[str, TrialRecord]):
        card = weights.card(Path("experiments/weights/rows/softmax.safetensors"))
        metrics = swept["softmax"].run.metrics
        assert (metrics["train_s"], metrics["train_samples"]) == (card["seconds"], 16)
        assert metrics["val_loss"] == pytest.approx(card["measured"]["val/loss"])

    def test_the_table_says_which_weights_ship(self, swept: dict[str, TrialRecord]):
        (note,) = [n for n in json.loads(Path("runs/tables/rows/table.json").read_text())["notes"] if "ship" in n]
        assert note.startswith("Weights ship with 'linear', '+ one step', 'softmax': trained by sana-lab ablate rows")

    def test_the_same_command_again_runs_nothing(self, swept: dict[str, TrialRecord], capsys, monkeypatch):
        monkeypatch.setattr(WorkerPool, "run", lambda *_: pytest.fail("a worker started"))
        assert runner.main("rows", workers=1) == 0
        assert "rows: all 4 trials are done" in capsys.readouterr().out

    def test_other_weights_are_another_trial(self, swept: dict[str, TrialRecord]):
        path = Path("experiments/weights/rows/softmax.safetensors")
        trial = swept["softmax"].trial
        assert (
            swept["softmax"].key == hashing.with_weights(hashing.trial_hash(trial), path) != hashing.trial_hash(trial)
        )
        copy = Path("other.safetensors")
        weights.write(copy, {k: v + 1 for k, v in weights.read(path).items()}, weights.card(path))
        assert hashing.with_weights("key", copy) != hashing.with_weights("key", path)


class TestRetrain:
    @pytest.fixture
    def empty(self, tmp_path: Path, empty_database: Path) -> Store:
        """A store without runs."""
        shutil.copy(empty_database, tmp_path / "mlflow.db")
        return Store(tmp_path)

    def test_it_ignores_what_ships_in_a_sweep_of_its_own(self, folder: Path, empty: Store):
        fresh, shipped = plan.load("rows", retrain=True), plan.load("rows")
        assert (fresh.name, shipped.name) == ("rows-retrained", "rows")
        assert [t.weights is None for t in shipped.trials] == [True, False, False, False]
        assert [state(r) for r in records(empty, fresh)[1:]] == ["to run"] * 3
        assert [state(r) for r in records(empty, shipped)[1:]] == ["weights ship, to evaluate"] * 3
        assert [quality.weights_file(t._asdict()) for t in fresh.trials[1:]] == [None] * 3

    def test_it_states_the_time_of_the_cards_beforehand(self, folder: Path, empty: Store):
        fresh = plan.load("rows", retrain=True)
        seconds = [weights.card(path)["seconds"] for path in Path("experiments/weights/rows").glob("*")]
        lines = shipping.announce(fresh, records(empty, fresh), workers=2)
        assert lines[0] == "rows-retrained: 3 models to measure; weights of 0 ship, 2 to train from nothing."
        assert lines[1].startswith(f"2 of them took {shipping.clock(sum(seconds))} of training on ")
        assert lines[1].endswith(f"about {shipping.clock(sum(seconds) / 2)} there with 2 at a time.")

    def test_a_changed_recipe_is_trained_and_its_time_unknown(self, folder: Path, empty: Store):
        changed = plan.load("rows", ["trainer.max_steps=2"])
        lines = shipping.announce(changed, records(empty, changed), workers=2)
        assert lines[0].endswith("2 models to measure; weights of 0 ship, 2 to train from nothing.")
        assert lines[1] == "The training time of 2 is not known; it is shown after 15 s of training."

    def test_weights_that_ship_with_the_lab_are_ignored_too(self, here: Path):
        trials = plan.load("sampler", retrain=True).trials
        assert {quality.weights_file(json.loads(json.dumps(t._asdict()))) for t in trials} == {None}


def test_a_folder_of_weights_that_is_missing_is_named(folder: Path):
    tiny.write(folder, "ablations/wrong.yaml", ROWS.replace("weights: rows", "weights: rovs"))
    with pytest.raises(SpecError, match=r"no folder 'rovs' in experiments/weights; did you mean 'rows'"):
        plan.load("wrong")
    assert plan.load("wrong", retrain=True).name == "wrong-retrained"


def test_a_pack_is_read_elsewhere(
    folder: Path, swept: dict[str, TrialRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Table, configurations, evaluations and weights; nothing in it names this machine's folders."""
    monkeypatch.chdir(folder)
    packing.main("rows", out=tmp_path / "rows.tar.gz")
    source = swept["linear"].trial.weights
    assert source is not None
    content = source.read_bytes()
    monkeypatch.chdir(tmp_path)
    with tarfile.open("rows.tar.gz") as archive:
        archive.extractall(filter="data")
    root = tmp_path / "rows"
    assert {"table.md", "table.csv", "report.html"} <= {path.name for path in (root / "table").iterdir()}
    trials = {row["label"]: row for row in json.loads((root / "trials.json").read_text())}
    assert trials.keys() == swept.keys()
    assert {row["status"] for row in trials.values()} == {"FINISHED"}
    linear = trials["linear"]
    assert "measures" in json.loads((root / "trials" / linear["key"] / "report.json").read_text())
    assert (root / "models" / linear["model"] / "weights.safetensors").read_bytes() == content
    texts = [p.read_text() for p in root.rglob("*") if p.suffix in (".txt", ".json", ".yaml", ".csv", ".md")]
    assert [text for text in texts if str(folder) in text] == []


def test_a_pack_of_nothing_is_refused(here: Path, runs: Path):
    tiny.write_experiment(here)
    tiny.write(here, "ablations/rows.yaml", ROWS.replace("weights: rows\n", ""))
    with pytest.raises(SpecError, match="sana-lab ablate rows"):
        packing.main("rows")
    assert not (here / "rows.tar.gz").exists()


def test_files_of_other_seeds_are_in_use(here: Path):
    """Those that `ship --seeds` wrote, when the seeds of the file are shipped."""
    tiny.write_experiment(here)
    tiny.write(here, "ablations/rows.yaml", ROWS.replace("weights: rows\n", ""))
    ours, other = plan.load("rows", retrain=True), plan.load("rows", retrain=True, seeds=[3])
    for name, key in (("ours", hashing.experiment_hash(other.trials[1].config)), ("strange", "0" * 16)):
        weights.write(here / f"{name}.safetensors", {"w": torch.zeros(1)}, {"seed": 3, "hash": key})
    used = shipping.models_of_other_seeds(ours, here)
    lines = shipping.summary(here, used, ["linear"], shipping.command("rows", [], None, "0-4"))
    assert [line for line in lines if "delete it" in line] == [f"no row uses {here / 'strange.safetensors'}; delete it"]
    assert lines[-1].endswith("run: sana-lab ablate rows --seeds 0-4 --retrain")
