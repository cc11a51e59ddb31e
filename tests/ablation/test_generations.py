"""Runs that follow the file of their ablation: the sweep's page, renamed labels, superseded trials, added measures."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import sweeps

from sana_lab import __main__
from sana_lab.ablation import (
    durations,
    generations,
    measures,
    packing,
    plan,
    quality_table,
    results,
    runner,
    sweep_page,
    worker,
)
from sana_lab.ablation.record import TRIAL
from sana_lab.ablation.trials import MEASURES, records, state
from sana_lab.checkpoints import weights
from sana_lab.config import hashing
from sana_lab.config.specs import SpecError
from sana_lab.tracking.store import MAX_TAG, Store

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader")  # mlflow 3.17 with sqlalchemy 2.1


@pytest.fixture(scope="module")
def finished(tmp_path_factory, empty_database) -> Path:
    """A folder with the ablation and its finished runs; do not change it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("finished"))
        sweeps.write_ablation(Path())
        Path("runs").mkdir()
        shutil.copy(empty_database, "runs/mlflow.db")
        sweeps.finish(Store(weights.HOME), plan.load("grid"))
        return Path.cwd()


@pytest.fixture
def store(finished, here) -> Store:
    """A copy of the finished sweep in the working directory."""
    from mlflow.tracking._tracking_service import utils

    shutil.copytree(finished, here, dirs_exist_ok=True)
    utils._artifact_repos_cache.clear()  # of runs with the same ids in another test's copy
    return Store(weights.HOME)


def rewrite(*changes: tuple[str, str]) -> plan.Plan:
    """The ablation after changes of its text."""
    text = sweeps.GRID
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    sweeps.write_ablation(Path(), text=text)
    return plan.load("grid")


def current(store: Store) -> list[str]:
    """Names of the runs that the view shows."""
    runs = store.find("grid", {"sana.kind": "trial", generations.STATE: generations.CURRENT})
    return sorted(run.name for run in runs)


class TestPage:
    def test_a_trial_has_its_labels_and_what_differs_as_parameters(self, store):
        run = store.run(records(store, plan.load("grid"))[3].run_id)
        assert run.params == {
            "axis.attention": "linear",
            "axis.depth": "two",
            "seed": "0",
            "system.dit.attention.name": "linear",
            "system.dit.depth": "2",
        } | {k: v for k, v in run.params.items() if k.startswith("system.dit.attention.")}
        assert "config/resolved.yaml" in run.tags["mlflow.note.content"]
        assert "cross_heads: 2" in store.file(run.id, "config/resolved.yaml").read_text()

    def test_its_duration_is_that_of_the_work_on_it(self, store):
        runs = [record.run for record in records(store, plan.load("grid"))]
        assert [run.ended - run.started for run in runs[:4]] == pytest.approx([60, 61, 62, 63], abs=0.1)

    def test_stretches_of_work_add_up_and_waiting_does_not_count(self, store):
        run = store.start_run("grid", "stretches")
        durations.add(store, run, 1000.0, 1005.0)
        assert (store.run(run).started, store.run(run).ended) == (1000.0, None)
        store.finish(run)
        durations.add(store, run, 2000.0, 2002.5)
        assert (store.run(run).started, store.run(run).ended) == (1000.0, 1007.5)

    def test_the_sweeps_own_run_answers_the_question(self, store, capsys):
        ablation = plan.load("grid")
        trials = records(store, ablation)
        results.write(store, "grid", ablation.table, trials, Path("out"))
        run = store.find("grid", {"sana.kind": "sweep"})[0]
        assert run.name == f"{ablation.table.title}: {ablation.table.question}"
        table = quality_table.build(store, ablation.table, trials)
        best = max(table.rows, key=lambda row: row.cells["exact"].mean)
        assert run.metrics["best/exact"] == pytest.approx(best.cells["exact"].mean)
        assert run.metrics["baseline/latency_s"] == pytest.approx(table.rows[0].cells["latency_s"].mean)
        assert (run.tags["sana.best"], run.tags["sana.baseline"]) == (best.label, "softmax · one")
        text = run.tags["mlflow.note.content"]
        first, table_text = text.split("\n\n")[:2]
        assert first.startswith(f"Best Exact: **{best.label}** with {best.cells['exact'].mean:.2f}; baseline")
        assert table_text.startswith("| Attention | Depth |")
        assert f"get-artifact?path=table%2Fexact.png&run_uuid={run.id}" in text
        assert all(f"/runs/{record.run_id})" in text for record in trials)
        assert {"exact.png", "samples.png", "report.html"} <= {p.name for p in store.file(run.id, "table").iterdir()}

    def test_a_description_never_exceeds_what_mlflow_holds(self):
        text = sweep_page.cut(["first", *("line\n" * 500 for _ in range(6))])
        assert text.startswith("first")
        assert MAX_TAG - 50 < len(text) <= MAX_TAG
        assert text.endswith("*More is in report.html.*")


class TestRenamed:
    def test_a_renamed_label_renames_its_runs(self, store, capsys):
        before = {record.run_id for record in records(store, plan.load("grid"))}
        ablation = rewrite(("    linear: {", "    ours: {"), ("    two: {", "    deep: {"))
        trials = generations.refresh(store, ablation)
        assert {record.run_id for record in trials} == before
        assert "grid: 'linear · two' is now called 'ours · deep'" in capsys.readouterr().out.splitlines()
        run = store.run(trials[3].run_id)
        assert run.name == run.tags["sana.label"] == "ours · deep"
        assert (run.params["axis.attention"], run.params["axis.depth"]) == ("ours", "deep")
        assert (run.tags["label.attention"], run.metrics["params_m"]) == ("ours", 2.5)
        assert "ours · deep (seed 2)" in current(store)
        generations.refresh(store, ablation)
        assert capsys.readouterr().out == ""

    def test_a_renamed_axis_leaves_no_old_parameter(self, store):
        run = store.run(generations.refresh(store, rewrite(("  attention:\n", "  mixer:\n")))[0].run_id)
        assert sorted(name for name in run.params if name.startswith("axis.")) == ["axis.depth", "axis.mixer"]


class TestSuperseded:
    def test_a_trial_that_is_no_longer_there_is_hidden_and_comes_back(self, store, capsys):
        generations.refresh(store, rewrite(("    two: {system.dit.depth: 2}\n", "")))
        out = capsys.readouterr().out
        assert "grid: 3 runs of 'linear · two' superseded, hidden from table and view" in out
        assert len(current(store)) == 6
        assert not any("two" in name for name in current(store))
        generations.refresh(store, rewrite())
        assert len(current(store)) == 12

    def test_runs_of_an_earlier_version_are_shown(self, store):
        from sana_lab.tracking.view import mark_current

        old = store.start_run("grid", "old", parent=store.find("grid", {"sana.kind": "sweep"})[0].id)
        mark_current(store, store.all_runs(store.run(old).experiment))
        assert "old" in [run.name for run in store.find("grid", {generations.STATE: generations.CURRENT})]


class TestSeeds:
    """Of `--seeds`, beside those of the file."""

    @pytest.fixture
    def fourth(self, store) -> Store:
        sweeps.finish(store, plan.load("grid", seeds=[3]))
        return store

    def test_they_are_kept_by_a_table_without_them(self, fourth, capsys):
        trials = generations.refresh(fourth, plan.load("grid"))
        assert {record.trial.seed for record in trials} == {0, 1, 2}
        assert capsys.readouterr().out == "grid: 4 runs of seeds 3 are kept, and shown with --seeds alone\n"
        assert len(current(fourth)) == 16

    def test_they_follow_the_file(self, fourth, capsys):
        generations.refresh(fourth, rewrite(("    linear: {", "    ours: {"), ("depth: 2}", "depth: 3}")))
        assert "grid: 4 runs of 'softmax · two' superseded" in capsys.readouterr().out
        names = [name for name in current(fourth) if name.endswith("(seed 3)")]
        assert names == ["ours · one (seed 3)", "softmax · one (seed 3)"]

    def test_a_pack_has_the_seeds_of_its_table(self, store, capsys):
        runner.write_table("grid", seeds="0-1")
        with pytest.raises(SpecError, match="is of seeds 0,1, and the trials to pack of 0,1,2; expected --seeds"):
            packing.main("grid")
        assert __main__.main(["pack", "grid", "--seeds", "0-1"]) == 0
        with tarfile.open("grid.tar.gz") as archive:
            rows = json.load(archive.extractfile("grid/trials.json"))
        assert {row["seed"] for row in rows} == {0, 1}


class TestAppended:
    WITH_CLIP = ("seeds: [0, 1, 2]", "seeds: [0, 1, 2]\ncommon: {eval.measures: [clip_shapes]}")

    @pytest.fixture
    def evaluated(self, monkeypatch) -> list[dict]:
        """Configurations that were evaluated; the evaluation itself is that of the new measure alone."""
        configs: list[dict] = []
        value = {"value": 21.5, "low": 20.0, "high": 23.0, "n": 12}
        measured = {"clip_shapes": {"values": {"clip_shapes": value}, "settings": {}}}
        report = {"per_image": {}, "measures": {**sweeps_measures(), **measured}}
        monkeypatch.setattr(measures.restore, "restore", lambda config, path: configs.append(config))
        monkeypatch.setattr(measures.evaluation, "evaluate", lambda *_, **__: report)
        monkeypatch.setattr(measures.weights, "find_trained", lambda *_: Path("weights"))
        return configs

    def test_a_finished_run_is_that_of_the_trial_with_more_measures(self, store):
        generations.refresh(store, plan.load("grid"))
        ablation = rewrite(self.WITH_CLIP)
        record = generations.refresh(store, ablation)[0]
        assert record.done
        assert record.lacks_measures
        assert not record.complete
        assert state(record) == "done, measures to append"

    def test_a_measure_is_appended_and_everything_else_stays(self, store, evaluated):
        before = generations.refresh(store, plan.load("grid"))[0].run
        record = generations.refresh(store, rewrite(self.WITH_CLIP))[0]
        trial = {"run": record.run_id, "key": record.key, "label": "softmax · one", "config": record.trial.config}
        worker.append(store, [trial])
        assert [spec["name"] for spec in evaluated[0]["eval"]["measures"]] == ["clip_shapes"]
        after = records(store, plan.load("grid"))[0]
        assert after.complete
        assert after.run.id == before.id
        assert after.run.metrics == {
            **before.metrics,
            "clip_shapes": 21.5,
            "clip_shapes_low": 20,
            "clip_shapes_high": 23,
        }
        assert after.run.status == "FINISHED"
        assert (after.run.started, after.run.ended) == (before.started, before.ended)
        report = json.loads(store.file(before.id, "report.json").read_text())
        assert report["measures"].keys() == {"exact", "geneval", "clip_shapes"}
        assert report["appended"].keys() == {"clip_shapes"}
        assert report["per_image"].keys() == {"exact", "geneval"}

    def test_a_measure_that_fails_leaves_the_run_finished(self, store, evaluated, monkeypatch):
        def fail(*_: object, **__: object) -> None:
            raise ValueError("no weights")

        monkeypatch.setattr(measures.evaluation, "evaluate", fail)
        generations.refresh(store, plan.load("grid"))
        record = generations.refresh(store, rewrite(self.WITH_CLIP))[0]
        worker.append(store, [{"run": record.run_id, "key": record.key, "label": "l", "config": record.trial.config}])
        record = records(store, plan.load("grid"))[0]
        assert (record.done, record.lacks_measures) == (True, True)
        assert record.run.tags["sana.append_error"] == "ValueError: no weights"

    def test_a_measure_that_is_dropped_needs_no_work_nor_does_its_return(self, store, evaluated):
        generations.refresh(store, plan.load("grid"))
        record = generations.refresh(store, rewrite(self.WITH_CLIP))[0]
        worker.append(store, [{"run": record.run_id, "key": record.key, "label": "l", "config": record.trial.config}])
        assert generations.refresh(store, rewrite())[0].complete
        assert generations.refresh(store, rewrite(self.WITH_CLIP))[0].complete

    def test_another_setting_is_another_trial(self, store):
        generations.refresh(store, plan.load("grid"))
        seeds, clip = self.WITH_CLIP
        changed = (seeds, clip.replace("{", "{eval.images_per_prompt: 2, "))
        assert generations.refresh(store, rewrite(changed))[0].run is None

    def test_the_core_of_a_trial_without_measures_is_its_hash(self, store):
        trial = plan.load("grid").trials[0]
        assert hashing.core_hash(trial) == hashing.trial_hash(trial)
        assert hashing.measure_hashes(trial) == {}
        run = records(store, plan.load("grid"))[0].run
        assert (run.tags[TRIAL], run.tags[MEASURES]) == (hashing.trial_hash(trial), "[]")


def sweeps_measures() -> dict:
    """Measures of the invented reports, with other numbers."""
    value = {"value": 0.0, "low": 0.0, "high": 0.0, "n": 1}
    return {name: {"values": {name: value}, "settings": {}} for name in ("exact", "geneval")}
