"""Rows of several sweeps in one table: what is comparable, what is marked, what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import sweeps

from sana_lab import __main__
from sana_lab.ablation import across, plan
from sana_lab.ablation.across import MARK, Sweep
from sana_lab.ablation.trials import records
from sana_lab.checkpoints import weights
from sana_lab.config.specs import SpecError
from sana_lab.report.table import Table
from sana_lab.tracking.store import Store

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader")

SMALL = sweeps.GRID.replace("    two: {system.dit.depth: 2}\n", "").replace("seeds: [0, 1, 2]", "seeds: [0]")
OTHER = (
    SMALL.replace("softmax: {", "first: {").replace("linear: {", "second: {").replace("softmax · one", "first · one")
)
OTHER = OTHER.replace("title: Attention and depth", "title: Longer").replace("  depth:\n", "  length:\n")
OTHER = OTHER.replace("seeds: [0]", "seeds: [0]\ncommon: {trainer.max_steps: 8}")


@pytest.fixture
def store(here: Path, empty_database: Path) -> Store:
    """Two finished sweeps whose numbers were measured alike."""
    (here / "runs").mkdir()
    shutil.copy(empty_database, here / "runs/mlflow.db")
    store = Store(weights.HOME)
    for name, text in (("small", SMALL), ("other", OTHER)):
        sweeps.write_ablation(here, name, text)
        sweeps.finish(store, plan.load(name))
    return store


def table(store: Store) -> Table:
    plans = [plan.load(name) for name in ("small", "other")]
    return across.build(store, [Sweep(each.name, each.table, records(store, each)) for each in plans])


def change(store: Store, measure: str, **settings: object) -> None:
    """Change how a measure of the second sweep was measured."""
    for record in records(store, plan.load("other")):
        report = json.loads(store.file(record.run_id, "report.json").read_text())
        report["measures"][measure]["settings"] |= settings
        store.log_dict(record.run_id, report, "report.json")


def marks(made: Table, name: str) -> list[bool]:
    """Whether each row's number in a column is marked as not comparable."""
    return [made.differences.get(row.label, {}).get(name, {}).get("mark") == MARK for row in made.rows]


def test_rows_of_both_are_in_one_table(store, capsys):
    assert __main__.main(["table", "small", "other"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("### Attention and depth and Longer")
    lines = [line for line in out.splitlines() if line.startswith(("| small", "| other"))]
    labels = ["softmax · one", "linear · one", "first · one", "second · one"]
    assert [line.split(" | ")[1] for line in lines] == labels
    folder = Path("runs/tables/small+other")
    assert {path.suffix for path in folder.iterdir()} >= {".md", ".tex", ".csv", ".json", ".html", ".png"}
    assert MARK not in out


def test_numbers_of_other_prompts_are_marked_and_those_of_others_are_not(store):
    change(store, "geneval", images=96)
    made = table(store)
    assert marks(made, "geneval") == [False, False, True, True]
    assert marks(made, "exact") == [False] * 4
    (note,) = [line for line in made.notes if line.startswith(MARK)]
    assert note.endswith("GenEval of 'other · first · one', 'other · second · one': images is 24 and 96.")
    assert {c.name: c.better for c in made.columns}["geneval"] is None  # no best among them


def test_times_of_another_machine_are_marked_and_counts_are_not(store):
    for record in records(store, plan.load("other")):
        store.set_tags(record.run_id, {"device": "NVIDIA H200"})
    made = table(store)
    assert marks(made, "latency_s") == [False, False, True, True]
    assert marks(made, "params_m") == marks(made, "gmacs") == marks(made, "exact") == [False] * 4


def test_sweeps_without_a_comparable_number_are_refused(store):
    for name in ("exact", "geneval"):
        change(store, name, images=96)
    for record in records(store, plan.load("other")):
        store.set_tags(record.run_id, {"device": "NVIDIA H200"})
    plans = [plan.load(name) for name in ("small", "other")]
    options = [p.table.__class__(**{**vars(p.table), "columns": ["latency_s", "exact", "geneval"]}) for p in plans]
    pairs = [Sweep(p.name, o, records(store, p)) for p, o in zip(plans, options, strict=True)]
    with pytest.raises(SpecError, match=r"nothing of 'other' is comparable with 'small': .*images is 24 and 96"):
        across.build(store, pairs)


def test_a_sweep_without_finished_trials_and_an_unknown_one_are_errors(store, capsys):
    sweeps.write_ablation(Path(), "new", SMALL.replace("seeds: [0]", "seeds: [7]"))
    assert __main__.main(["table", "small", "new"]) == 1
    assert "new has no finished trial; run: sana-lab ablate new" in capsys.readouterr().err
    assert __main__.main(["table", "small", "othre"]) == 1
    assert "did you mean 'other'?" in capsys.readouterr().err
