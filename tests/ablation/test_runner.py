"""Which trials run, which reuse a model, what is recorded of a worker that dies; the whole road is in test_road."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from PIL import Image
from rich.console import Console

from sana_lab import __main__
from sana_lab.ablation import jobs as stages
from sana_lab.ablation import plan, quality, quality_table, runner
from sana_lab.ablation.executors.local import Local
from sana_lab.ablation.jobs import Jobs
from sana_lab.ablation.pool import WorkerPool
from sana_lab.ablation.progress import ProgressBar
from sana_lab.ablation.protocol import EVALUATION, MEASUREMENT, Job, Progress
from sana_lab.ablation.record import TrialRecord
from sana_lab.ablation.trials import records, state
from sana_lab.checkpoints import weights
from sana_lab.config import experiments, hashing
from sana_lab.config.specs import SpecError
from sana_lab.tracking.store import Store
from sana_lab.training import train

pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:DeprecationWarning"  # mlflow 3.17 with sqlalchemy 2.1
)

GRID = """
title: Solvers and steps
base: tiny
axes:
  attention:
    softmax: {system.dit.attention: softmax}
    linear: {system.dit.attention: linear}
  steps:
    2: {sampling.steps: 2}
    4: {sampling.steps: 4}
"""


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory, empty_database) -> Iterator[Path]:
    """A working directory with two experiments, an ablation and an empty store."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("here"))
        tiny.write_experiment(Path(), changes={"data.size": 16, "trainer.max_steps": 0})
        tiny.write_experiment(Path(), "squeeze", tiny.SQUEEZE, {"trainer.max_steps": 5})
        tiny.write(Path(), "ablations/grid.yaml", GRID)
        Path("runs").mkdir()
        shutil.copy(empty_database, "runs/mlflow.db")
        yield Path.cwd()


@pytest.fixture(scope="module")
def store(folder) -> Store:
    store = Store(weights.HOME)
    store.create("grid")
    return store


def grid(store: Store, recipe: str = "grid") -> list[TrialRecord]:
    """The trials of an ablation with their runs."""
    return records(store, plan.load(recipe))


def start(store: Store, record: TrialRecord, **tags: str) -> str:
    return store.start_run("grid", record.trial.label, {"sana.kind": "trial", "sana.trial": record.key, **tags})


def started(store: Store, record: TrialRecord) -> TrialRecord:
    return record._replace(run=store.run(start(store, record)))


@pytest.fixture
def jobs(store) -> Iterator[Jobs]:
    bar, executor = ProgressBar("grid", 100, console=Console(file=io.StringIO())), Local(workers=1)
    yield Jobs(store, WorkerPool(weights.HOME / "sweeps/grid", bar, executor), None)
    executor.close()


def test_rows_that_differ_in_sampling_share_a_model(store):
    trials = grid(store)
    assert [r.trial.label for r in trials] == ["softmax · 2", "softmax · 4", "linear · 2", "linear · 4"]
    assert len({r.key for r in trials}) == 4
    groups = stages.by_model(trials)
    assert [[r.trial.label for r in group] for group in groups] == [
        ["softmax · 2", "softmax · 4"],
        ["linear · 2", "linear · 4"],
    ]


def test_a_trial_records_the_environment_as_it_was_written(store, monkeypatch):
    monkeypatch.setenv("PLACE", "a-value-of-the-environment")
    tiny.write(Path(), "ablations/place.yaml", GRID.replace("{sampling.steps: 2}", "{prompts: ['${oc.env:PLACE}']}"))
    record = grid(store, "place")[0]
    assert record.trial.config["prompts"] == ["a-value-of-the-environment"]
    run = runner.trial_run(store, "grid", start(store, record), record, ["prompts"])
    assert run.params["prompts"] == '["${oc.env:PLACE}"]'
    assert "a-value" not in store.file(run.id, "config/resolved.yaml").read_text()
    store.finish(run.id)


def test_a_job_with_values_of_the_environment_is_not_left_on_disk(jobs):
    assert jobs.pool.run("nothing", Job("measure", "runs", 1, [])) == 0
    assert not (jobs.pool.folder / "nothing.json").exists()


class TestRecords:
    def test_the_newest_run_counts_and_a_finished_one_before_all(self, store):
        first, second = grid(store)[:2]
        assert (first.run, first.done, state(first)) == (None, False, "to run")
        old, new = start(store, first), start(store, first)
        failed = start(store, second)
        store.finish(old)
        store.finish(new, "FAILED")
        store.set_tags(failed, {"sana.error": "ValueError: no"})
        store.finish(failed, "FAILED")
        first, second, third, _ = grid(store)
        assert (first.run.id, first.done, state(first)) == (old, True, "done")
        assert (second.run.id, second.done, state(second)) == (failed, False, "failed: ValueError: no")
        assert third.run is None

    def test_a_trained_model_is_known_before_any_run(self, store):
        third, fourth = grid(store)[2:]
        train.train(third.trial.config)
        assert [state(r) for r in grid(store)[2:]] == ["trained, to evaluate"] * 2
        run = start(store, fourth, **{"sana.judged": fourth.key})
        fourth = grid(store)[3]
        assert (fourth.run.id, fourth.evaluated, state(fourth)) == (run, True, "unfinished")

    def test_the_dry_run_lists_them(self, store, capsys):
        assert __main__.main(["ablate", "grid", "--dry-run"]) == 0
        head, *lines = capsys.readouterr().out.splitlines()
        assert head == "Solvers and steps: 4 trials of 2 trained models"
        for line, record in zip(lines, grid(store), strict=True):
            assert line.split()[:3] == [record.key, "model", record.model]
            assert record.trial.label in line
            assert line.endswith(state(record))


class TestJobs:
    def test_a_worker_that_dies_fails_the_runs_it_left_open(self, store, jobs):
        ended, open_ = (started(store, r) for r in grid(store)[:2])
        store.finish(ended.run_id)
        jobs.end([ended, open_], -9, "model")
        assert [store.run(r.run_id).status for r in (ended, open_)] == ["FINISHED", "FAILED"]
        error = store.run(open_.run_id).tags["sana.error"]
        assert error.startswith("its process ended with status -9; see /")
        assert error.endswith("runs/sweeps/grid/model.log")

    @pytest.mark.parametrize(("status", "stopped"), [(0, False), (-15, True)])
    def test_one_that_ended_well_or_was_stopped_fails_nothing(self, store, jobs, status, stopped):
        record = started(store, grid(store)[0])
        jobs.pool.stopped = stopped
        jobs.end([record], status, "model")
        assert store.run(record.run_id).status == "RUNNING"

    def test_messages_of_workers_move_the_bar(self, jobs, capsys):
        for message in (
            Progress(10, "linear: step 10 of 40", resumed=True),
            Progress(5, "linear"),
            Progress(0, "at it"),
        ):
            message.send()
        for line in ("some talk of a library\n", "@ home\n", *capsys.readouterr().out.splitlines(True)):
            jobs.pool.show(line)
        assert jobs.pool.bar.task.completed == 15
        assert jobs.pool.bar.task.fields["text"] == "at it"

    def test_nothing_starts_after_a_stop(self, jobs):
        jobs.pool.stop()
        assert jobs.pool.run("later", Job("evaluate", "runs", 1, [])) == 0
        assert not (jobs.pool.folder / "later.json").exists()

    def test_needed_models_that_cannot_be_trained_fail_what_takes_them_and_nothing_else(self, jobs, store, monkeypatch):
        Path("experiments/again.yaml").write_text(
            "base: squeeze\nsystem: {autoencoder: 'experiment:squeeze'}\nseed: 1\n"
        )
        titles = []
        monkeypatch.setattr(jobs.pool, "run", lambda title, job: titles.append(title) or 1)
        jobs.train("squeeze")
        jobs.train("again")
        assert titles == ["train-squeeze"]
        trials = grid(store)
        configs = [experiments.load("tiny", [f"system.autoencoder=experiment:{n}"]) for n in ("squeeze", "again")]
        trials[:2] = [r._replace(trial=r.trial._replace(config=c)) for r, c in zip(trials[:2], configs, strict=True)]
        trials = [started(store, r) for r in trials[:3]]
        assert [jobs.blocked(r) for r in trials] == [True, True, False]
        runs = [store.run(r.run_id) for r in trials]
        assert [r.status for r in runs] == ["FAILED", "FAILED", "RUNNING"]
        assert runs[0].tags["sana.error"].startswith("training 'squeeze', which it takes weights from, failed; see /")
        assert runs[1].tags["sana.error"] == runs[0].tags["sana.error"]


def test_experiments_that_trials_take_weights_from_come_first_and_once(store):
    Path("ablations/frozen.yaml").write_text(
        GRID.replace("softmax: {", 'softmax: {system.autoencoder: "experiment:squeeze", ')
    )
    trials = grid(store, "frozen")
    assert stages.untrained(trials) == ["squeeze"]
    with runner.progress("frozen", trials, trials, ["squeeze"]) as bar:
        assert bar.task.total == 5 + 4 * (EVALUATION + MEASUREMENT)
    assert stages.untrained(trials[2:]) == []
    train.train(experiments.load("squeeze"))
    assert stages.untrained(trials) == []


def test_experiments_inside_experiments_are_trained_innermost_first(store):
    inner = "base: squeeze\nsystem: {autoencoder: 'experiment:inner'}\n"
    for name, text in (("inner", "base: squeeze\nseed: 5\n"), ("outer", inner), ("side", "base: squeeze\nseed: 6\n")):
        Path(f"experiments/{name}.yaml").write_text(text)
    Path("ablations/deep.yaml").write_text(
        "title: Deep\nbase: tiny\naxes: {a: {"
        "one: {system.autoencoder: 'experiment:outer'}, two: {system.autoencoder: 'experiment:side'}}}\n"
    )
    names = stages.untrained(grid(store, "deep"))
    assert names == ["inner", "outer", "side"]
    assert [sorted(group) for group in stages.in_order(names)] == [["inner", "side"], ["outer"]]


class TestStopped:
    @pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, "KILLED"), (OSError, "FAILED")])
    def test_runs_end_with_the_sweep(self, store, monkeypatch, error, status):
        def stop(*_: object) -> None:
            raise error

        name = f"stopped-{status}"
        monkeypatch.setattr(runner, "work_off", stop)
        with pytest.raises(error):
            runner.run(store, plan.load("grid")._replace(name=name), Local(workers=1))
        assert [r.status for r in store.find(name, {"sana.kind": "sweep"})] == [status]
        assert [r.status for r in store.find(name, {"sana.kind": "trial"})] == ["KILLED"] * 4

    @pytest.fixture
    def heard(self) -> Iterator[None]:
        """Signals are heard, also where the tests run under nohup."""
        before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
        yield
        for number, handler in before.items():
            signal.signal(number, handler)

    @pytest.mark.usefixtures("heard")
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
    def test_sigterm_and_a_closed_terminal_stop_as_ctrl_c_does(self, store, monkeypatch, number):
        """Also while the runs start; a second signal does not interrupt what ends them."""
        name, ablation = f"signal-{number}", plan.load("grid")
        start_trial = runner.trial_run

        def interrupted(*arguments, **options):
            run = start_trial(*arguments, **options)
            os.kill(os.getpid(), number)
            return run

        monkeypatch.setattr(runner, "trial_run", interrupted)
        handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP)]
        with runner.terminable():
            with pytest.raises(KeyboardInterrupt):
                runner.run(store, ablation._replace(name=name), Local(workers=1))
            os.kill(os.getpid(), number)
        assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP)] == handlers
        assert [r.status for r in store.find(name)] == ["KILLED"] * 2

    def test_what_a_kill_left_open_goes_on_or_is_ended(self, store, monkeypatch):
        ablation = plan.load("grid")
        one = ablation._replace(name="left", trials=ablation.trials[:1])
        key = hashing.trial_hash(one.trials[0])
        current, old = (store.start_run("left", k, {"sana.kind": "trial", "sana.trial": k}) for k in (key, "another"))
        monkeypatch.setattr(runner, "work_off", lambda *_: None)
        runner.run(store, one, Local(workers=1))
        assert [store.run(r).status for r in (current, old)] == ["RUNNING", "KILLED"]


class TestWorkerOfAKilledRunner:
    """A worker's imports take seconds; here torch takes a minute."""

    def command(self, folder: Path, runner: str) -> str:
        (folder / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
        Job("measure", "runs", 1, []).write(folder / "job.json")
        line = {"job": str(folder / "job.json"), "log": str(folder / "log"), "keep": False}
        (folder / "lines").write_text(json.dumps(line) + "\n")
        return f"[sys.executable, '-m', 'sana_lab.ablation.worker', {runner}]"

    def variables(self, folder: Path) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": f"{folder}:{Path(runner.__file__).parents[2]}"}

    def test_it_ends_while_it_imports(self, tmp_path):
        words = self.command(tmp_path, "str(os.getpid())")
        code = f"import os, subprocess, sys; subprocess.run({words}, stdin=open('{tmp_path}/lines'))"
        variables = self.variables(tmp_path)
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=variables, text=True) as killed:
            assert killed.stdout.readline() == "importing\n"
            killed.kill()
            start = time.monotonic()
            assert killed.stdout.read() == ""  # until the worker, which holds the other end, is gone
            assert time.monotonic() - start < 20

    def test_it_does_not_begin_where_the_runner_has_ended(self, tmp_path):
        command = eval(self.command(tmp_path, "'999999999'"))
        done = subprocess.run(command, capture_output=True, env=self.variables(tmp_path), timeout=50)
        assert (done.returncode, done.stdout) == (1, b"")


def test_equal_settings_under_two_labels_are_named(store, capsys):
    """They are one trial: no comparison, and no replicates."""
    text = GRID.replace("linear: {system.dit.attention: linear}", "same: {system.dit.attention: softmax}")
    Path("ablations/equal.yaml").write_text(text)
    line = "Rows 'softmax · 2', 'same · 2' have equal settings: one trial, run once."
    assert __main__.main(["ablate", "equal", "--dry-run"]) == 0
    assert line in capsys.readouterr().out
    assert line in quality_table.measurement_notes(grid(store, "equal"))


def test_a_sweep_that_was_killed_after_its_last_trial_is_finished(store, capsys):
    Path("ablations/ended.yaml").write_text(GRID.replace("Solvers", "Ended"))
    store.create("ended")
    ended = plan.load("ended")
    parent = runner.sweep_run(store, ended)
    for record in records(store, ended):
        run = store.start_run("ended", record.trial.label, {"sana.kind": "trial", "sana.trial": record.key}, parent)
        store.finish(run)
    assert store.run(parent).status == "RUNNING"
    runner.run(store, ended, Local(workers=1))
    assert "ended: all 4 trials are done" in capsys.readouterr().out
    assert store.run(parent).status == "FINISHED"


@pytest.mark.parametrize("workers", [0, -1])
def test_no_workers_are_refused(folder, workers):
    with pytest.raises(ValueError, match=f"workers is {workers}, expected at least 1"):
        runner.main("grid", workers=workers)


def test_one_sweep_of_a_name_at_a_time(folder):
    with runner.lock("grid"):
        with pytest.raises(ValueError, match=r"another process is running the ablation 'grid' in /.*runs"):
            runner.lock("grid").__enter__()
        with runner.lock("other"):
            pass
    with runner.lock("grid"):
        pass


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{system.dit.atention: linear}", "did you mean 'attention'"),
        ("{data.size: 20}", "20 is not a multiple of 8"),
        ("{system.autoencoder: 'experiment:sqeeze'}", "no experiment 'sqeeze'; did you mean 'squeeze'"),
    ],
)
def test_a_mistake_in_any_row_is_found_before_the_first_runs(folder, text, words):
    Path("ablations/wrong.yaml").write_text(GRID.replace("{sampling.steps: 4}", text))
    with pytest.raises(SpecError, match=words):
        runner.main("wrong", workers=1)
    assert not (weights.HOME / "sweeps/wrong").exists()


@pytest.mark.parametrize("measure", ["clip_shapes", "{name: distances, extractor: shapes}"])
def test_captions_that_an_evaluation_needs_are_missed_before_the_first_trains(folder, measure):
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    for name in ("a", "b"):
        Image.new("RGB", (32, 32)).save(pictures / f"{name}.png")
    (pictures / "a.txt").write_text("a red circle")
    (pictures / "b.txt").unlink(missing_ok=True)
    options = f"{{eval.captions: pictures, eval.measures: [{measure}]}}"
    Path("ablations/bare.yaml").write_text(GRID.replace("{sampling.steps: 4}", options))
    with pytest.raises(ValueError, match=r"1 of 2 held-out pictures have none: 'b.png'"):
        runner.main("bare", dry_run=True)
    (pictures / "b.txt").write_text("a blue star")
    assert runner.main("bare", dry_run=True) == 0


def test_a_dry_run_reads_the_headers_of_pictures(folder):
    pictures = folder / "photos"
    pictures.mkdir()
    for i in range(4):
        Image.new("RGB", (32, 32)).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text("a red circle")
    (pictures / "3.png").write_bytes(b"no picture")
    text = GRID.replace("axes:", "common: {data: {name: folder, root: photos, size: 16, batch: 1, held_out: 1}}\naxes:")
    Path("ablations/photos.yaml").write_text(text)
    with pytest.warns(UserWarning, match=r"skipped 1 of 4 files: '?3.png") as caught:
        assert runner.main("photos", dry_run=True) == 0
    assert len(caught) == 1


def test_a_model_that_ships_is_not_trained_again(here, monkeypatch):
    """`sampler` asks one trained model for many samplings, and that model comes with the lab."""
    ablation = plan.load("sampler")
    assert {state(r) for r in records(Store(weights.HOME), ablation)} == {"weights ship, to evaluate"}
    monkeypatch.setattr(quality.train, "train", lambda *args, **options: pytest.fail("it was trained"))
    trial = ablation.trials[0]
    quality.fit(None, {"config": trial.config, "label": trial.label, "run": "none"})
