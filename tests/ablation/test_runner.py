"""Which trials run, which reuse a model, what is recorded of a worker that dies; the whole road is in test_road."""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest

from sana_lab import __main__
from sana_lab.ablation import runner, worker
from sana_lab.ablation.progress import Bar
from sana_lab.ablation.trials import Item, items
from sana_lab.checkpoints import weights
from sana_lab.config import ablations, experiments, hashing, schema
from sana_lab.config.specs import SpecError
from sana_lab.tracking.store import Store
from sana_lab.training import train

pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:DeprecationWarning"  # mlflow 3.17 with sqlalchemy 2.1
)

TINY = """
system:
  name: text2image
  dit: {name: sana, dim: 32, depth: 1, cross_heads: 2}
  autoencoder: {name: vae, widths: [8, 8, 8, 8], depth: 1, groups: 2}
  text_encoder: {name: t5, width: 32, layers: 1, heads: 2, max_tokens: 16}
data: {name: shapes, size: 16, batch: 4, held_out: 4}
trainer: {max_steps: 0, accelerator: cpu, threads: 1}
"""
SQUEEZE = """
system:
  name: autoencoder
  autoencoder: {name: vae, widths: [8, 8, 8, 8], depth: 1, groups: 2}
data: {name: shapes, size: 16, batch: 64, held_out: 4}
trainer: {max_steps: 5, accelerator: cpu, threads: 1}
"""
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
def folder(tmp_path_factory) -> Iterator[Path]:
    """A working directory with two experiments, an ablation and an empty store."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("here"))
        for path, text in (("experiments/tiny", TINY), ("experiments/squeeze", SQUEEZE), ("ablations/grid", GRID)):
            Path(f"{path}.yaml").parent.mkdir(exist_ok=True)
            Path(f"{path}.yaml").write_text(text)
        yield Path.cwd()


@pytest.fixture(scope="module")
def store(folder) -> Store:
    made = Store(weights.HOME)
    made.create("grid")
    return made


def trials(name: str = "grid") -> list[schema.Trial]:
    return ablations.load_ablation(name)[1]


def start(store: Store, item: Item, **tags: str) -> str:
    return store.start_run("grid", item.trial.label, {"sana.kind": "trial", "sana.trial": item.key, **tags})


@pytest.fixture
def jobs(store) -> runner.Jobs:
    return runner.Jobs(store, "grid", Bar("grid", 100, file=io.StringIO()), 1)


def test_rows_that_differ_in_sampling_share_a_model(folder):
    found = [Item(t, hashing.trial_hash(t), hashing.experiment_hash(t.experiment), None) for t in trials()]
    assert [i.trial.label for i in found] == ["softmax · 2", "softmax · 4", "linear · 2", "linear · 4"]
    assert len({i.key for i in found}) == 4
    groups = runner._by_model(found)
    assert [[i.trial.label for i in group] for group in groups] == [
        ["softmax · 2", "softmax · 4"],
        ["linear · 2", "linear · 4"],
    ]


class TestLedger:
    def test_the_newest_run_counts_and_a_finished_one_before_all(self, store):
        first, second = items(store, "grid", trials())[:2]
        assert (first.run, first.done, first.state) == (None, False, "to run")
        old, new = start(store, first), start(store, first)
        failed = start(store, second)
        store.finish(old)
        store.finish(new, "FAILED")
        store.set_tags(failed, {"sana.error": "ValueError: no"})
        store.finish(failed, "FAILED")
        first, second, third, _ = items(store, "grid", trials())
        assert (first.run.id, first.done, first.state) == (old, True, "done")
        assert (second.run.id, second.done, second.state) == (failed, False, "failed: ValueError: no")
        assert third.run is None

    def test_a_trained_model_is_known_before_any_run(self, folder, store):
        third, fourth = items(store, "grid", trials())[2:]
        train.train(third.trial.experiment)
        assert [i.state for i in items(store, "grid", trials())[2:]] == ["trained, to judge"] * 2
        run = start(store, fourth, **{"sana.judged": fourth.key})
        fourth = items(store, "grid", trials())[3]
        assert (fourth.run.id, fourth.judged, fourth.state) == (run, True, "unfinished")

    def test_the_dry_run_lists_them(self, store, capsys):
        assert __main__.main(["ablate", "grid", "--dry-run"]) == 0
        head, *lines = capsys.readouterr().out.splitlines()
        assert head == "Solvers and steps: 4 trials of 2 trained models"
        for line, item in zip(lines, items(store, "grid", trials()), strict=True):
            assert line.split()[:3] == [item.key, "model", item.model]
            assert item.trial.label in line
            assert line.endswith(item.state)


class TestJobs:
    def test_a_worker_that_dies_fails_the_runs_it_left_open(self, store, jobs):
        group = items(store, "grid", trials())[:2]
        runs = [start(store, item) for item in group]
        store.finish(runs[0])
        jobs._finish([i._replace(run=store.run(r)) for i, r in zip(group, runs, strict=True)], -9, "model")
        assert [store.run(r).status for r in runs] == ["FINISHED", "FAILED"]
        error = store.run(runs[1]).tags["sana.error"]
        assert error.startswith("its process ended with status -9; see /")
        assert error.endswith("runs/sweeps/grid/model.log")

    @pytest.mark.parametrize(("status", "stopped"), [(0, False), (-15, True)])
    def test_one_that_ended_well_or_was_stopped_fails_nothing(self, store, jobs, status, stopped):
        item = items(store, "grid", trials())[0]
        run = start(store, item)
        jobs.stopped = stopped
        jobs._finish([item._replace(run=store.run(run))], status, "model")
        assert store.run(run).status == "RUNNING"

    def test_lines_of_workers_move_the_bar(self, jobs):
        for line in ("@ 10 linear: step 10 of 40\n", "some talk of a library\n", "@ 5 linear\n", "@ 0 judging it\n"):
            jobs._told(line)
        assert jobs.bar.n == 15
        assert jobs.bar.postfix == "judging it"

    def test_nothing_starts_after_a_stop(self, jobs):
        jobs.stop()
        assert jobs._work("later", {"kind": "judge", "trials": []}) == 0
        assert not (jobs.folder / "later.json").exists()

    def test_frozen_parts_that_cannot_be_trained_fail_what_takes_them_and_nothing_else(self, jobs, store, monkeypatch):
        Path("experiments/again.yaml").write_text(
            "base: squeeze\nsystem: {autoencoder: 'experiment:squeeze'}\nseed: 1\n"
        )
        tried = []
        monkeypatch.setattr(jobs, "_work", lambda title, job: tried.append(title) or 1)
        jobs.frozen("squeeze")
        jobs.frozen("again")
        assert tried == ["train-squeeze"]
        with_it = [f"system.autoencoder=experiment:{name}" for name in ("squeeze", "again")]
        first, second = (trials()[0]._replace(experiment=experiments.load("tiny", [o])) for o in with_it)
        made = [Item(t, hashing.trial_hash(t), "m", None) for t in (first, second, trials()[2])]
        made = [i._replace(run=store.run(start(store, i))) for i in made]
        assert [jobs.lacks(i) for i in made] == [True, True, False]
        runs = [store.run(i.run.id) for i in made]
        assert [r.status for r in runs] == ["FAILED", "FAILED", "RUNNING"]
        assert runs[0].tags["sana.error"].startswith("training 'squeeze', which it takes weights from, failed; see /")
        assert runs[1].tags["sana.error"] == runs[0].tags["sana.error"]


def test_experiments_that_trials_take_weights_from_come_first_and_once(folder, store):
    Path("ablations/frozen.yaml").write_text(
        GRID.replace("softmax: {", 'softmax: {system.autoencoder: "experiment:squeeze", ')
    )
    found = items(store, "frozen", trials("frozen"))
    assert runner._frozen(found) == ["squeeze"]
    with runner._progress("frozen", found, ["squeeze"], found) as bar:
        assert bar.total == 5 + 4 * (runner.JUDGED + runner.BENCHED)
    assert runner._frozen(found[2:]) == []
    train.train(experiments.load("squeeze"))
    assert runner._frozen(found) == []


def test_experiments_inside_experiments_are_trained_innermost_first(folder, store):
    inner = "base: squeeze\nsystem: {autoencoder: 'experiment:inner'}\n"
    for name, text in (("inner", "base: squeeze\nseed: 5\n"), ("outer", inner), ("side", "base: squeeze\nseed: 6\n")):
        Path(f"experiments/{name}.yaml").write_text(text)
    Path("ablations/deep.yaml").write_text(
        "title: Deep\nbase: tiny\naxes: {a: {"
        "one: {system.autoencoder: 'experiment:outer'}, two: {system.autoencoder: 'experiment:side'}}}\n"
    )
    names = runner._frozen(items(store, "deep", trials("deep")))
    assert names == ["inner", "outer", "side"]
    assert [sorted(group) for group in runner._ranks(names)] == [["inner", "side"], ["outer"]]


class TestStopped:
    @pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, "KILLED"), (OSError, "FAILED")])
    def test_runs_end_with_the_sweep(self, folder, store, monkeypatch, error, status):
        def stop(*_: object) -> None:
            raise error

        name = f"stopped-{status}"
        monkeypatch.setattr(runner, "_work_off", stop)
        ablation, made = ablations.load_ablation("grid")
        with pytest.raises(error):
            runner.run(store, name, ablation, made, 1)
        assert [r.status for r in store.find(name, {"sana.kind": "sweep"})] == [status]
        assert [r.status for r in store.find(name, {"sana.kind": "trial"})] == ["KILLED"] * 4

    def test_what_a_kill_left_open_goes_on_or_is_ended(self, folder, store, monkeypatch):
        ablation, made = ablations.load_ablation("grid")
        key = hashing.trial_hash(made[0])
        kept, old = (store.start_run("left", k, {"sana.kind": "trial", "sana.trial": k}) for k in (key, "another"))
        monkeypatch.setattr(runner, "_work_off", lambda *_: None)
        runner.run(store, "left", ablation, made[:1], 1)
        assert [store.run(r).status for r in (kept, old)] == ["RUNNING", "KILLED"]


def test_a_sweep_with_overrides_is_another_one(folder):
    plain = runner.sweep_name("paper/grid", None)
    changed = {runner.sweep_name("paper/grid", None, [f"seed={i}"]) for i in (0, 1)}
    assert plain == "paper-grid"
    assert len(changed | {plain, runner.sweep_name("paper/grid", "toy", ["seed=0"])}) == 4
    assert all(name.startswith("paper-grid-") for name in changed)


def test_one_sweep_of_a_name_at_a_time(folder):
    with runner.alone("grid"):
        with pytest.raises(ValueError, match=r"another process is running the ablation 'grid' in /.*runs"):
            runner.alone("grid").__enter__()
        with runner.alone("other"):
            pass
    with runner.alone("grid"):
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
        runner.main("wrong", [], 1, False, None)
    assert not (weights.HOME / "sweeps/wrong").exists()


def test_a_model_that_ships_is_not_trained_again(here, monkeypatch):
    """`sampler` asks one trained model for many samplings, and that model comes with the lab."""
    _, trials = ablations.load_ablation("sampler")
    assert {i.state for i in items(Store(weights.HOME), "sampler", trials)} == {"trained, to judge"}
    monkeypatch.setattr(worker.train, "train", lambda *args, **options: pytest.fail("it was trained"))
    worker.fit(None, {"experiment": trials[0].experiment, "label": trials[0].label, "run": "none"})
