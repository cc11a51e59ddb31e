"""Points of an ablation's trainings in its table: speed-ups, words for what is missing, plots, CSV."""

import csv
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

from sana_lab.ablation import learning_table, plan, quality, quality_table, shipping
from sana_lab.ablation.learning_table import Trainings
from sana_lab.ablation.plan import Plan
from sana_lab.ablation.trials import records
from sana_lab.checkpoints import weights
from sana_lab.report import render
from sana_lab.report.table import Table, build_table
from sana_lab.tracking.store import Store

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader")  # mlflow 3.17 with sqlalchemy 2.1

ABLATION = """
title: Rates
base: squeeze
common: {trainer.max_steps: 6, trainer.validate_every: 3, eval.at: [0.33, 0.67, 1], eval.at_images: 4,
  eval.reconstructions: 8}
axes:
  rate:
    low: {system.lr: 1.0e-3}
    high: {system.lr: 1.0e-2}
    none: {trainer.max_steps: 0}
seeds: [0, 1]
columns: [psnr, speedup_steps]
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory, empty_database) -> Iterator[Store]:
    """A working directory with the ablation, all of whose trials have run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("here"))
        tiny.write_experiment(Path(), "squeeze", tiny.SQUEEZE)
        tiny.write(Path(), "ablations/rates.yaml", ABLATION)
        Path("runs").mkdir()
        shutil.copy(empty_database, "runs/mlflow.db")
        store = Store(weights.HOME)
        store.create("rates")
        for record in records(store, plan.load("rates")):
            tags = {"sana.kind": "trial", "sana.trial": record.key}
            run = store.start_run("rates", record.trial.label, tags)
            trial = {"run": run, "key": record.key, "label": record.trial.label, "config": record.trial.config}
            quality.fit(store, trial)
            quality.evaluate(store, trial)
            store.finish(run)
        yield store


@pytest.fixture(scope="module")
def rates(store) -> Plan:
    return plan.load("rates")


@pytest.fixture(scope="module")
def table(store, rates) -> Table:
    return quality_table.build(store, rates.table, records(store, rates))


def test_the_table_has_both_speed_ups(table):
    assert [c.name for c in table.columns] == ["psnr", "speedup_steps", "speedup_seconds"]
    low, high, none = table.rows
    assert low.cells["speedup_steps"].mean == low.cells["speedup_seconds"].mean == 1.0
    assert high.cells["speedup_steps"].n == 2
    assert "speedup_steps" not in none.cells
    text = render.to_markdown(table)
    assert "Speed-up to reach the baseline (steps) ↑ | Speed-up to reach the baseline (seconds) ↑" in text
    assert "what 'low' needs for the PSNR of its end, " in text
    assert "on 4 images a point and seed" in text
    assert "by a bootstrap over seeds and prompts" in text
    assert "of the training's time, which is not in it" in text


def test_it_is_the_speed_up_of_the_recorded_points(store, rates, table):
    trainings = learning_table.collect(store, records(store, rates))
    curves = trainings.curves("psnr")
    assert {label: [[v.steps for v in c] for c in seeds] for label, seeds in curves.items()} == {
        "low": [[2, 4, 6]] * 2,
        "high": [[2, 4, 6]] * 2,
    }
    assert {v.images for c in curves["low"] for v in c} == {128, 256, 384}
    means = {
        label: [sum(v.value for v in at) / 2 for at in zip(*seeds, strict=True)] for label, seeds in curves.items()
    }
    target = means["low"][-1]
    steps = (2, 4, 6)
    passed = next((i for i, y in enumerate(means["high"]) if y >= target), None)
    base = next(i for i, y in enumerate(means["low"]) if y >= target)

    def reached(y: list[float], i: int) -> float:
        return steps[i] if i == 0 else steps[i] - 2 * (y[i] - target) / (y[i] - y[i - 1])

    expected = 0.0 if passed is None else reached(means["low"], base) / reached(means["high"], passed)
    assert table.rows[1].cells["speedup_steps"].mean == pytest.approx(expected)


def test_the_note_says_where_the_points_end(store, rates, table):
    trainings = learning_table.collect(store, records(store, rates))
    assert trainings.steps == {"low": 6, "high": 6, "none": 0}
    longer = trainings._replace(steps={"low": 1_200})
    text = render.to_markdown(learning_table.with_speedups(table, longer, "low"))
    assert "what 'low' needs for the PSNR of its last point (step 6 of 1,200), " in text
    assert "what 'low' needs for the PSNR of its end, " in render.to_markdown(table)


def test_plots_over_steps_images_and_seconds(store, rates, table, tmp_path):
    paths = quality_table.plot(store, rates.table, records(store, rates), table, tmp_path)
    assert {"psnr_by_steps.png", "psnr_by_images.png", "psnr_by_seconds.png"} <= {path.name for path in paths}


def test_points_ship_with_the_weights(store, rates, tmp_path):
    """A run of shipped weights has the points of the training elsewhere, once though it is evaluated twice."""
    record = records(store, rates)[0]
    source = weights.trained(record.trial.config)
    assert source is not None
    shipping.write(tmp_path / "low.safetensors", source, weights.card(source))
    trial = {"run": store.start_run("rates", "shipped"), "config": record.trial.config}
    for _ in range(2):
        quality.log_points(store, trial, tmp_path / "low.safetensors")
    file = json.loads(store.file(trial["run"], learning_table.FILE).read_text())
    assert file == json.loads(store.file(record.run_id, learning_table.FILE).read_text())
    assert len(store.client.get_metric_history(trial["run"], "points/psnr")) == 3


def points(values: list[float], **more: Any) -> dict[str, Any]:
    rows = [
        {
            "step": 100 * (i + 1),
            "images": 800 * (i + 1),
            "seconds": 10.0 * (i + 1),
            "values": {"geneval": {"value": v, "low": v, "high": v, "n": 4}},
            "per_image": {"geneval": {"values": [v] * 4, "clusters": [0, 0, 1, 1], "drawn": "x"}},
        }
        for i, v in enumerate(values)
    ]
    return {"points": rows, "share": 0.02, **more}


def rows_of(**rows: list[float]) -> tuple[Table, Trainings]:
    common = {"seed": 0, "status": "finished", "error": None, "run_id": "r", "commit": None}
    records = [
        {"label": k, "labels": {"row": k}, "metrics": {"params_m": 1.0, "geneval": v[-1]}, **common}
        for k, v in rows.items()
    ]
    table = build_table(records, title="T")
    return table, Trainings({k: [points(v)] for k, v in rows.items()}, [])


def test_not_reached_is_said_in_every_format():
    table, trainings = rows_of(base=[0.1, 0.2, 0.4], slow=[0.1, 0.2, 0.3], fast=[0.2, 0.4, 0.5], first=[0.5, 0.5, 0.6])
    table = learning_table.with_speedups(table, trainings, "base")
    lines = {line["row"]: line for line in csv.DictReader(io.StringIO(render.to_csv(table)))}
    assert [lines[k]["speedup_steps"] for k in ("base", "slow", "fast", "first")] == [
        "1.0",
        "not reached",
        "1.5",
        "3.0",
    ]
    assert lines["slow"]["speedup_seconds"] == "not reached"
    assert (lines["slow"]["speedup_steps_low"], lines["fast"]["speedup_steps_low"]) == ("", "1.5")
    assert "| not reached | not reached |" in render.to_markdown(table)
    assert "not reached" in render.to_latex(table)
    assert "At least so much, as the first point is already as good: 'first'." in table.notes
    assert "Points took 2.0% to 2.0% of the training's time, which is not in it." in table.notes


def test_rows_without_points_are_named_and_a_table_without_any_is_as_before():
    table, trainings = rows_of(base=[0.1, 0.4], other=[0.1, 0.4])
    lacking = Trainings({"base": trainings.rows["base"]}, ["other"])
    changed = learning_table.with_speedups(table, lacking, "base")
    assert "speedup_steps" not in changed.rows[1].cells
    assert changed.notes[0].startswith("No points of 'other': trained before they were asked for")
    assert learning_table.with_speedups(table, Trainings({}, []), "base") == table
    only = learning_table.with_speedups(table, Trainings({"other": trainings.rows["other"]}, []), "base")
    assert [c.name for c in only.columns] == [c.name for c in table.columns]


def test_a_finished_trial_that_lacks_points_is_named(store, rates):
    """Trained before the ablation asked for points: nothing is trained again, and the table says so."""
    plain = [r for r in records(store, rates) if r.trial.label == "none"]
    assert learning_table.collect(store, plain).lacking == []  # no steps, no points
    more = [r._replace(trial=r.trial._replace(config=with_points(r.trial.config))) for r in plain]
    assert learning_table.collect(store, more).lacking == ["none"]


def with_points(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "trainer": {**config["trainer"], "max_steps": 6}}
