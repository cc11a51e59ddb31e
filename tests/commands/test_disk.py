"""Commands `du` and `rm` on a store with two sweeps and a model that nothing uses."""

from pathlib import Path

import pytest
import tiny
import torch

from sana_lab import __main__
from sana_lab.checkpoints import weights
from sana_lab.checkpoints.weights import HOME
from sana_lab.commands import disk, model_use
from sana_lab.config import experiments, hashing
from sana_lab.tracking.store import Store
from sana_lab.training import train

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader")


@pytest.fixture
def store(runs, monkeypatch) -> Store:
    """Sweeps a and b with two rows of two seeds each, models of one row and one more."""
    monkeypatch.setattr(model_use, "KINDS", ())  # what the lab ships
    monkeypatch.setattr(model_use, "recipe_names", list)
    store = Store(HOME)
    for sweep in ("a", "b"):
        parent = store.start_run(sweep, sweep, {"sana.kind": "sweep"})
        for label in ("one", "two"):
            for seed in range(2):
                tags = {"sana.kind": "trial", "sana.label": label, "sana.trial": f"{sweep}{label}{seed}"}
                tags |= {"sana.model": label, "sana.state": "current" if label == "one" else "superseded"}
                run = store.start_run(sweep, f"{label} {seed}", tags, parent)
                store.log_dict(run, {"text": "x" * 1000}, "report.json")
                store.finish(run)
        (HOME / "tables" / sweep).mkdir(parents=True)
        (HOME / "tables" / sweep / "table.md").write_text("x" * 500)
    for model in ("one", "unused"):
        (HOME / "models" / model).mkdir(parents=True)
        (HOME / "models" / model / "weights.safetensors").write_bytes(b"x" * 10_000)
    return store


def names(store: Store, sweep: str) -> list[str]:
    return sorted(run.name for run in store.summaries(sweep))


def test_usage_is_listed_by_sweep_and_use(store, capsys):
    assert __main__.main(["du"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(None, 2)[2] for line in lines[:4]] == [
        *("sweep b", "sweep a"),
        "1 models in use",
        "1 unused models (sana-lab rm --models)",
    ]
    assert lines[2].split()[:2] == ["10.0", "kB"]
    assert lines[-1].endswith("free on this disk")


def test_a_run_a_row_superseded_ones_and_a_sweep_are_removed(store, capsys):
    run = next(run for run in store.summaries("a") if run.name == "one 0")
    assert __main__.main(["rm", run.id[:12], "--yes"]) == 0
    assert names(store, "a") == ["a", "one 1", "two 0", "two 1"]
    assert not (store.artifacts / run.id).exists()
    assert __main__.main(["rm", "a:one", "--yes"]) == 0
    assert names(store, "a") == ["a", "two 0", "two 1"]
    assert __main__.main(["rm", "a", "--superseded", "--yes"]) == 0
    assert names(store, "a") == ["a"]
    assert __main__.main(["rm", "a", "--yes"]) == 0
    assert list(store.experiments()) == ["b"]
    assert not (HOME / "tables/a").exists()
    assert names(store, "b") == ["b", "one 0", "one 1", "two 0", "two 1"]
    assert store.create("a")  # a new one, without the old runs
    assert names(store, "a") == []


def test_only_models_that_nothing_uses_are_removed(store, capsys):
    assert __main__.main(["rm", "--models", "--yes"]) == 0
    assert [path.name for path in (HOME / "models").iterdir()] == ["one"]
    assert __main__.main(["rm", "--models", "--yes"]) == 0
    assert capsys.readouterr().out.endswith("nothing to remove\n")


class TestServer:
    def test_removed_runs_are_hidden_until_the_server_frees_their_space(self, server, capsys):
        store = server.store(HOME)
        runs = [store.start_run("a", name, {"sana.kind": "trial", "sana.label": name}) for name in ("one", "two")]
        other = store.start_run("b", "other")
        (HOME / "downloads" / runs[0]).mkdir(parents=True)
        (HOME / "downloads" / runs[0] / "report.json").write_text("x" * 1000)
        assert __main__.main(["rm", "a:one", "a:two", "--yes"]) == 0
        out = capsys.readouterr().out
        assert "removed 1.0 kB\n" in out
        assert out.endswith("hides the runs; `mlflow gc` on the server removes them and frees their space\n")
        assert (names(store, "a"), names(store, "b")) == ([], ["other"])
        assert [server.inner.get_run(run).info.lifecycle_stage for run in runs] == ["deleted"] * 2
        assert server.inner.get_run(other).info.lifecycle_stage == "active"
        assert not (HOME / "downloads" / runs[0]).exists()

    def test_a_removed_sweep_does_not_come_back_with_its_name(self, server, capsys):
        store = server.store(HOME)
        old = store.start_run("a", "old")
        assert __main__.main(["rm", "a", "--yes"]) == 0
        assert "`mlflow gc`" in capsys.readouterr().out
        assert store.experiments() == {"Default": "0"}
        new = store.start_run("a", "new")
        assert [run.id for run in store.summaries("a")] == [new]
        assert server.inner.get_run(old).info.lifecycle_stage == "deleted"


def test_it_asks_first(store, capsys, monkeypatch):
    assert __main__.main(["rm", "b"]) == 1
    assert "add --yes" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    assert __main__.main(["rm", "b"]) == 1
    assert "b" in store.experiments()


@pytest.mark.parametrize(
    ("target", "words"),
    [("aa", "no sweep 'aa'"), ("a:on", "no row 'on'; did you mean 'one'?"), ("0123456789", "0 runs have an id")],
)
def test_what_does_not_exist_is_an_error(store, target: str, words: str, capsys):
    assert __main__.main(["rm", target]) == 1
    assert words in capsys.readouterr().err


def test_an_empty_folder_has_nothing(here: Path, capsys):
    assert __main__.main(["rm"]) == 1
    assert "nothing to remove; expected a sweep" in capsys.readouterr().err


def model(name: str, experiment: str | None = None) -> Path:
    """A trained model's folder with the card of an experiment, or one of a training that has not finished."""
    folder = HOME / "models" / name
    folder.mkdir(parents=True)
    if experiment is None:
        (folder / "last.ckpt").write_bytes(b"x")
    else:
        weights.write(folder / "weights.safetensors", {"w": torch.zeros(1)}, {"experiment": experiment, "hash": name})
    return folder


def unused() -> list[str]:
    return [path.name for path in disk.unused_models(Store(HOME))[0]]


class TestModelsThatTrialsNeed:
    """They are trained in a sweep and have no run."""

    @pytest.fixture
    def folder(self, here: Path, runs: Path, monkeypatch) -> Path:
        monkeypatch.setattr(experiments, "roots", lambda kind: [here / kind])
        tiny.write_experiment(here, "sets/deep")
        stages = "{small: {trainer: {max_steps: 1}}, end: {trainer: {max_steps: 2}}}"
        tiny.write(here, "experiments/staged.yaml", f"{{base: sets/deep, stages: {stages}}}")
        tiny.write(here, "mine.yaml", "{base: sets/deep, trainer: {max_steps: 3}}")
        return here

    def test_those_of_subfolders_stages_and_paths_are_in_use(self, folder: Path):
        for name in ("sets/deep", "staged@small", "mine.yaml"):
            model(hashing.experiment_hash(experiments.load(name)), name)
        model("0" * 16, "a label")
        assert unused() == ["0" * 16]

    def test_those_of_experiments_whose_data_are_away_may_be_in_use(self, folder: Path, monkeypatch):
        for name, experiment in (("1", "other/deep.yaml"), ("2", "a label")):
            model(name, experiment)
        for name, size in (("3", 32), ("4", 64)):
            text = train.as_yaml(experiments.load("sets/deep", [f"data.size={size}"]))
            (model(name) / "experiment.yaml").write_text(text)

        def away(config: object) -> str:
            raise ValueError("no such folder")

        monkeypatch.setattr(hashing, "experiment_hash", away)
        assert unused() == ["2", "4"]

    def test_those_that_a_run_takes_weights_from_are_in_use(self, folder: Path):
        store, key = Store(HOME), hashing.experiment_hash(experiments.load("mine.yaml"))
        model(key, "a label")
        assert unused() == [key]
        run = store.start_run("a", "one", {"sana.kind": "trial", "sana.model": "one"})
        store.log_params(run, {"eval": {"measures": [{"name": "clip", "weights": "experiment:mine.yaml"}]}})
        assert unused() == []


def test_models_of_local_sweeps_are_in_use_where_runs_are_elsewhere(store, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    assert unused() == ["unused"]


def test_models_of_sweeps_that_are_recorded_elsewhere_stay(store, capsys):
    (HOME / "far.sweep.lock").touch()
    (HOME / "models" / "two").mkdir()
    assert __main__.main(["rm", "--models", "--yes"]) == 0
    assert "runs of far are elsewhere; models that no run here names may be theirs" in capsys.readouterr().out
    assert sorted(path.name for path in (HOME / "models").iterdir()) == ["one", "unused"]
