"""Commands `du` and `rm` on a store with two sweeps and a model that nothing uses."""

from pathlib import Path

import pytest

from sana_lab import __main__
from sana_lab.checkpoints.weights import HOME
from sana_lab.commands import disk
from sana_lab.tracking.store import Store

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader")


@pytest.fixture
def store(runs, monkeypatch) -> Store:
    """Sweeps a and b with two rows of two seeds each, models of one row and one more."""
    monkeypatch.setattr(disk, "experiment_hashes", lambda: [])
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
