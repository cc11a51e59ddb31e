"""Searches: proposals from the runs' records, rungs of ASHA, a kill in the middle, the table, and mistakes."""

import json
import math
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import tiny

from sana_lab import __main__
from sana_lab.ablation import generations, measures, plan, quality, quality_table, runner, worker
from sana_lab.ablation.executors import Executor
from sana_lab.ablation.protocol import Job
from sana_lab.ablation.pruners.asha import Asha
from sana_lab.ablation.record import EVALUATED, RUNGS, TrialRecord
from sana_lab.ablation.search import Observation
from sana_lab.ablation.search.judging import RungJudge
from sana_lab.ablation.search.optuna_search import OptunaSearch
from sana_lab.ablation.search.proposals import VALUES, Explorer, with_proposals
from sana_lab.ablation.search.settings import for_worker
from sana_lab.ablation.search.space import SearchSpace
from sana_lab.ablation.trials import measures_of, records, state
from sana_lab.checkpoints import weights
from sana_lab.config import experiments
from sana_lab.config.schema import Ablation, Range, Trial
from sana_lab.config.specs import SpecError
from sana_lab.tracking.store import Store
from sana_lab.training import points, train
from sana_lab.training.pruned import Judge, Pruned

pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:DeprecationWarning"  # mlflow 3.17 with sqlalchemy 2.1
)

SEARCH = """
title: Learning rate
base: tiny
search: {name: optuna, trials: 12, startup: 4, pruner: asha}
ranges: {system.optimizer.lr: {low: 1.0e-5, high: 1.0, log: true}}
axes:
  attention: {linear: {}, softmax: {system.dit.attention: softmax}}
columns: [val_loss]
"""
SCORE = {"metric": "exact", "lower": False}
SPACE = {
    "attention": ["linear", "softmax"],
    "lr": Range(1e-5, 1.0, log=True),
    "dim": Range(32, 256, integer=True, step=32),
}


@pytest.fixture
def folder(runs: Path) -> Path:
    """A working directory with an experiment of 27 steps, the search, and an empty store."""
    changes = {"trainer.max_steps": 27, "trainer.validate_every": 1, "data.size": 16, "prompts": []}
    tiny.write_experiment(Path(), changes=changes)
    tiny.write(Path(), "ablations/lr.yaml", SEARCH)
    return Path.cwd()


def finite(options: str, most: int) -> str:
    """A search of 2 * `most` points."""
    old = "ranges: {system.optimizer.lr: {low: 1.0e-5, high: 1.0, log: true}}"
    text = SEARCH.replace(old, f"ranges: {{system.warmup: {{low: 1, high: {most}, integer: true}}}}")
    return text.replace("trials: 12, startup: 4, pruner: asha", options)


class InProcess(Executor):
    """Does jobs in this process; after `jobs` of them Ctrl-C comes."""

    slots = threads = whole = 1
    devices = None

    def __init__(self, jobs: int = 10**6) -> None:
        self.left, self.titles = jobs, []

    def check(self) -> None:
        """Nothing."""

    def run(self, title: str, job: Job) -> int:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.titles.append(title)
        worker.do(job)
        return 0

    def stop(self) -> None:
        """Nothing."""


def loss(config: dict, step: int) -> float:
    """The toy objective: a parabola over the logarithm of the learning rate, softmax a little better."""
    better = 0.0 if config["system"]["dit"]["attention"]["name"] == "softmax" else 0.2
    return (math.log10(config["system"]["optimizer"]["lr"]) + 2.5) ** 2 + better + 1 / step


@pytest.fixture
def toy(monkeypatch) -> None:
    """Trials that train nothing: validation losses, measures and costs are those of the toy objective."""

    def fit(store: Store, trial: dict) -> None:
        judge, last = quality.judge_of(store, trial), trial["config"]["trainer"]["max_steps"]
        for step in range(1, last + 1):
            if judge is not None and judge.stops(step, value := loss(trial["config"], step)):
                raise Pruned(step, value)

    def evaluate(store: Store, trial: dict) -> None:
        steps = trial["config"]["trainer"]["max_steps"]
        store.log_metrics(trial["run"], {"val_loss": loss(trial["config"], steps)})
        store.set_tags(trial["run"], {EVALUATED: trial["key"]})

    monkeypatch.setattr(quality, "fit", fit)
    monkeypatch.setattr(quality, "evaluate", evaluate)
    monkeypatch.setattr(quality, "measure", lambda store, trial: store.finish(trial["run"]))


def search(executor: Executor | None = None, recipe: str = "lr") -> tuple[Store, list[TrialRecord]]:
    """The trials after a search in this folder."""
    store, ablation = Store(weights.HOME), plan.load(recipe)
    runner.run(store, ablation, executor or InProcess())
    return store, records(store, with_proposals(store, ablation))


def proposed(trials: list[TrialRecord]) -> list[tuple]:
    """Point, status, and where it was pruned, of each trial."""
    return [(r.run.tags[VALUES], r.run.status, state(r)) for r in trials]


@pytest.mark.usefixtures("folder", "toy")
class TestSearch:
    @pytest.fixture(autouse=True)
    def _optuna(self) -> None:
        pytest.importorskip("optuna", reason="Optuna is not installed: pip install 'sana_lab[search]'")

    def test_it_finds_the_minimum_prunes_and_leaves_no_run_open(self, capsys):
        executor = InProcess()
        store, trials = search(executor)
        assert len(trials) == 12
        assert {r.run.status for r in trials} == {"FINISHED", "KILLED"}
        assert {r.run.status for r in trials if not r.pruned} == {"FINISHED"}
        best = min(r.run.metrics["val_loss"] for r in trials if r.done)
        assert best < 0.35
        ends = [state(r) for r in trials if r.pruned]
        assert {text.split(",")[0] for text in ends} <= {f"pruned at step {step}" for step in (1, 3, 9)}
        assert [r.status for r in store.find("lr", {"sana.kind": "sweep"})] == ["FINISHED"]
        table = quality_table.build(store, plan.load("lr").table, trials)
        assert [row.label for row in table.rows] == [r.trial.label for r in trials if not r.pruned]
        counted = next(note for note in table.notes if "pruned" in note)
        assert counted.startswith(
            f"{len(ends)} of 12 trials were pruned and have no row (asha, the best 1 of 3 of each"
        )
        assert any(f"val_loss {best:.4f}"[-6:] in note and "is the lowest of" in note for note in table.notes)
        trainings = len(executor.titles)
        runner.run(store, plan.load("lr"), executor)
        assert len(executor.titles) == trainings  # pruned ones are not trained again
        assert "all 0 trials" not in capsys.readouterr().out

    def test_a_search_that_was_killed_goes_on_with_the_same_proposals(self, folder):
        _, whole = search()
        (folder / "ablations/again.yaml").write_text(SEARCH)
        with pytest.raises(KeyboardInterrupt):
            search(InProcess(jobs=7), "again")
        store = Store(weights.HOME)
        killed = [r for r in store.find("again", {"sana.kind": "trial"}) if r.status == "KILLED"]
        store.resume(killed[0].id)  # as `kill -9` leaves it
        _, trials = search(recipe="again")
        assert proposed(trials) == proposed(whole)
        assert len(store.find("again", {"sana.kind": "trial"})) == 12

    def test_more_trials_later_keep_those_before(self, folder):
        _, first = search()
        (folder / "ablations/lr.yaml").write_text(SEARCH.replace("trials: 12", "trials: 14"))
        executor = InProcess()
        _, trials = search(executor)
        assert proposed(trials)[:12] == proposed(first)
        assert len(trials) == 14
        assert len([title for title in executor.titles if title != "bench"]) == 2

    def test_a_changed_experiment_begins_anew(self, folder):
        search()
        (folder / "ablations/lr.yaml").write_text(SEARCH.replace("axes:", "common: {trainer.max_steps: 9}\naxes:"))
        assert with_proposals(Store(weights.HOME), plan.load("lr")).trials == []

    def test_a_space_that_is_exhausted_ends_the_search_with_a_line(self, folder, capsys):
        text = SEARCH.replace("{low: 1.0e-5, high: 1.0, log: true}", "{low: 1.0e-3, high: 1.001e-3}")
        (folder / "ablations/lr.yaml").write_text(text)
        store, trials = search()
        assert len(trials) == 4
        words = "lr: the search ends after 4 of 12 trials, as no other point was found: all have a trial"
        assert words in capsys.readouterr().out
        assert [r.status for r in store.find("lr", {"sana.kind": "sweep"})] == ["FINISHED"]

    def test_a_finite_space_is_searched_to_its_last_point(self, folder):
        (folder / "ablations/lr.yaml").write_text(finite("trials: 16, sampler: random", 8))
        _, trials = search()
        assert {r.run.tags[VALUES] for r in trials} == {
            json.dumps({"attention": a, "system.warmup": w}) for a in ("linear", "softmax") for w in range(1, 9)
        }

    def test_points_of_equal_settings_are_one_trial_and_the_search_ends(self, folder, capsys):
        text = finite("trials: 6", 2).replace("linear: {}", "linear: {}, same: {}")
        (folder / "ablations/lr.yaml").write_text(text)
        _, trials = search()
        assert len(trials) == 4
        assert "the search ends after 4 of 6 trials" in capsys.readouterr().out

    def test_without_its_pruner_pruned_trials_are_trained_to_their_end(self, folder):
        _, before = search()
        assert any(r.pruned for r in before)
        (folder / "ablations/lr.yaml").write_text(SEARCH.replace(", pruner: asha", ""))
        store, trials = search()
        assert {r.run.status for r in trials} == {"FINISHED"}
        assert [r.run_id for r in trials] == [r.run_id for r in before]
        assert len(quality_table.build(store, plan.load("lr").table, trials).rows) == 12
        (folder / "ablations/lr.yaml").write_text(SEARCH)
        assert not any(r.pruned for r in search()[1])

    def test_a_grid_of_the_same_name_trains_what_was_pruned(self, folder):
        pruned = next(r for r in search()[1] if r.pruned)
        values = json.loads(pruned.run.tags[VALUES])
        attention = SEARCH.split("axes:\n")[1]
        lr = values["system.optimizer.lr"]
        grid = f"title: Grid\nbase: tiny\naxes:\n  lr: {{one: {{system.optimizer.lr: {lr}}}}}\n{attention}"
        (folder / "ablations/lr.yaml").write_text(grid)
        (same,) = [r for r in records(Store(weights.HOME), plan.load("lr")) if r.run is not None]
        assert (same.run_id, same.complete, state(same)) == (pruned.run_id, False, "unfinished")
        _, trials = search()
        assert [r.run.status for r in trials if r.key == same.key] == ["FINISHED"]

    def test_a_pruner_on_another_metric_does_not_count_what_the_first_pruned(self):
        _, trials = search()
        pruned = next(r for r in trials if r.pruned)
        assert not pruned._replace(pruning="exact").pruned
        assert not pruned._replace(pruning=None).complete

    def test_measures_are_appended_to_points_that_a_grid_has_finished(self, folder, monkeypatch):
        grid = (
            finite("", 2)
            .replace("search: {name: optuna, }\n", "")
            .replace(
                "ranges: {system.warmup: {low: 1, high: 2, integer: true}}\naxes:",
                "axes:\n  warmup: {one: {system.warmup: 1}, two: {system.warmup: 2}}",
            )
        )
        (folder / "ablations/lr.yaml").write_text(grid)
        store, ablation = Store(weights.HOME), plan.load("lr")
        runner.run(store, ablation, InProcess())
        before = {r.run_id for r in records(store, ablation)}
        appended = []

        def append(store: Store, trial: dict) -> None:
            appended.append(trial["run"])
            run = store.run(trial["run"])
            assert run.status == "FINISHED"
            whole = Trial({}, 0, trial["config"])
            store.set_tags(run.id, generations.appended_tags(trial["key"], whole, measures_of(run)))

        monkeypatch.setattr(measures, "append", append)
        monkeypatch.setattr(quality, "evaluate", None)
        more = finite("trials: 4", 2) + "common: {eval.measures: [{name: clip_shapes}]}\n"
        (folder / "ablations/lr.yaml").write_text(more)
        _, trials = search()
        assert set(appended) == before == {r.run_id for r in trials}
        assert all(r.complete for r in trials)
        assert [r.status for r in store.find("lr", {"sana.kind": "sweep"})] == ["FINISHED"]

    def test_points_that_the_file_cannot_build_any_more_are_left_out(self, monkeypatch):
        store, trials = search()
        ablation, built = plan.load("lr"), SearchSpace.trial
        kinds = {json.loads(r.run.tags[VALUES])["attention"] for r in trials}

        def trial(space: SearchSpace, values: dict) -> Trial:
            if values["attention"] == "softmax":
                raise SpecError("no")
            return built(space, values)

        monkeypatch.setattr(SearchSpace, "trial", trial)
        assert kinds == {"linear", "softmax"}
        assert {t.labels["attention"] for t in with_proposals(store, ablation).trials} == {"linear"}

    def test_a_run_that_was_deleted_is_dropped(self):
        store, ablation = Store(weights.HOME), plan.load("lr")
        store.create("lr")
        parent = runner.sweep_run(store, ablation)
        explorer = Explorer(store, ablation, lambda r, tags: runner.trial_run(store, "lr", parent, r, [], {}, tags))
        first, second = explorer.next(), explorer.next()
        store.delete_run(first.run_id)
        third = explorer.next()
        assert [r.run_id for r in explorer.records] == [second.run_id, third.run_id]
        assert explorer.remaining == 10

    def test_several_slots_propose_beside_each_other(self):
        """Both are at work before either goes on, so that each proposal is beside a running trial."""
        barrier, lock = threading.Barrier(2), threading.Lock()

        class TwoSlots(InProcess):
            slots = 2

            def run(self, title: str, job: Job) -> int:
                if job.kind == "evaluate":
                    barrier.wait(60)
                with lock:
                    return super().run(title, job)

        executor = TwoSlots()
        _, trials = search(executor)
        assert len({r.run.tags[VALUES] for r in trials}) == len(trials) == 12
        assert all(r.complete for r in trials)
        assert len([title for title in executor.titles if title != "bench"]) == 12

    def test_a_measure_that_a_finished_trial_lacks_ends_the_search(self, folder):
        (folder / "ablations/lr.yaml").write_text(SEARCH.replace("pruner: asha", "measure: exact"))
        with pytest.raises(
            SpecError, match="has finished without 'exact', which its search decides by; there is: val_loss"
        ):
            search()
        (folder / "ablations/lr.yaml").write_text(SEARCH.replace(", pruner: asha", ""))
        assert len(with_proposals(Store(weights.HOME), plan.load("lr")).trials) == 1  # it is kept

    def test_a_failed_trial_is_tried_again_by_the_next_command(self, monkeypatch):
        fit = quality.fit

        def fail(store: Store, trial: dict) -> None:
            if len(store.find("lr", {"sana.kind": "trial"})) == 3:
                raise RuntimeError("no")
            fit(store, trial)

        monkeypatch.setattr(quality, "fit", fail)
        _, trials = search()
        assert [i for i, r in enumerate(trials) if r.run.status == "FAILED"] == [2]
        monkeypatch.setattr(quality, "fit", fit)
        _, again = search()
        assert again[2].run.status in ("FINISHED", "KILLED")
        assert again[2].run.tags[VALUES] == trials[2].run.tags[VALUES]

    def test_a_dry_run_says_what_it_will_do(self, capsys):
        assert __main__.main(["ablate", "lr", "--dry-run"]) == 0
        text = capsys.readouterr().out
        assert "search of 12 trials by optuna, sampler tpe with seed 0, for the lowest val_loss" in text
        assert "system.optimizer.lr: 1e-05 to 1 (logarithmic)" in text
        assert "attention: linear, softmax" in text
        assert "the best 1 of 3 of each rung goes on, by val_loss at steps 1, 3, 9 of 27" in text
        assert "0 trials so far, 12 to propose; costs are those without pruning" in text
        assert "12 trainings" in text
        assert "Learning rate: search of up to 12 trials, so far 0 of 0 trained models" in text
        search()
        capsys.readouterr()
        assert __main__.main(["ablate", "lr", "--dry-run"]) == 0
        text = capsys.readouterr().out
        assert "12 trials so far, 0 to propose" in text
        assert "pruned at step 1, val_loss" in text
        assert __main__.main(["table", "lr"]) == 0

    def test_trials_that_run_are_known_to_the_proposals(self):
        """Two workers ask one after the other, while nothing has ended."""
        store, ablation = Store(weights.HOME), plan.load("lr")
        store.create("lr")
        parent = runner.sweep_run(store, ablation)
        explorer = Explorer(store, ablation, lambda r, tags: runner.trial_run(store, "lr", parent, r, [], {}, tags))
        trials = [explorer.next() for _ in range(12)]
        assert len({r.key for r in trials}) == 12
        assert explorer.next() is None


class TestOptuna:
    """Proposals alone."""

    @pytest.fixture(autouse=True)
    def _optuna(self) -> None:
        pytest.importorskip("optuna", reason="Optuna is not installed: pip install 'sana_lab[search]'")

    def history(self, searcher: OptunaSearch, number: int) -> list[Observation]:
        history: list[Observation] = []
        for i in range(number):
            values = searcher.propose(SPACE, history, 0, lower=True)
            value = (math.log10(values["lr"]) + 2.5) ** 2
            pruned = Observation(values, "pruned", rungs={3: value})
            history.append(pruned if i % 4 == 3 else Observation(values, "finished", value))
        return history

    @pytest.mark.parametrize("sampler", ["tpe", "random"])
    def test_a_proposal_depends_on_the_history_and_the_seed_alone(self, sampler):
        searcher = OptunaSearch(trials=20, sampler=sampler, startup=5)
        history = self.history(searcher, 12)
        assert self.history(OptunaSearch(trials=20, sampler=sampler, startup=5), 12) == history
        other = OptunaSearch(trials=20, sampler=sampler, startup=5, seed=1)
        assert self.history(other, 12) != history
        assert searcher.propose(SPACE, history, 0, lower=True) != searcher.propose(SPACE, history, 1, lower=True)

    def test_values_are_in_the_ranges_and_at_their_steps(self):
        for each in self.history(OptunaSearch(trials=20, startup=5), 16):
            assert each.values["attention"] in ("linear", "softmax")
            assert 1e-5 <= each.values["lr"] <= 1
            assert each.values["lr"] == float(f"{each.values['lr']:.4g}")
            assert each.values["dim"] in range(32, 257, 32)

    def test_the_gaussian_process_proposes(self):
        searcher = OptunaSearch(trials=20, sampler="gp", startup=3)
        history = self.history(searcher, 5)
        assert searcher.propose(SPACE, history, 0, lower=True) == searcher.propose(SPACE, history, 0, lower=True)

    def test_results_attract_the_sampler(self):
        """After a parabola was seen at many points, proposals are nearer to its minimum than uniform ones."""
        history = self.history(OptunaSearch(trials=100, sampler="random"), 40)
        searcher = OptunaSearch(trials=100, startup=10)
        away = [abs(math.log10(searcher.propose(SPACE, history, i, lower=True)["lr"]) + 2.5) for i in range(10)]
        assert sum(away) / len(away) < 0.7  # uniform: 1.25


class TestAsha:
    def test_rungs_grow_by_the_reduction_and_end_before_the_training(self):
        assert Asha().rungs(first=100, last=900) == [100, 300]
        assert Asha(reduction=2, first=150).rungs(first=100, last=1000) == [150, 300, 600]
        assert Asha().rungs(first=100, last=100) == []

    def test_the_best_of_each_rung_goes_on(self):
        asha = Asha(reduction=3)
        assert not asha.stops(5.0, [])
        assert asha.stops(5.0, [4.0])
        assert not asha.stops(3.0, [4.0])
        assert [asha.stops(v, [1.0, 2.0, 3.0, 4.0, 5.0]) for v in (0.5, 1.5, 2.5)] == [False, False, True]
        assert asha.stops(math.nan, [])
        assert not asha.stops(2.0, [math.nan, 3.0])


class TestRungs:
    """The judge of a worker, by the runs of others."""

    CONFIG: ClassVar = {
        "trainer": {"max_steps": 100, "validate_every": 10, "max_seconds": None},
        "eval": {"at": [], "every": 10},
    }

    def judge(self, store: Store, metric: str = "exact", lower: bool = False) -> RungJudge:
        run = store.start_run("rungs", "one", {"sana.kind": "trial"})
        return RungJudge(
            store, run, self.CONFIG, {"sweep": "rungs", "pruner": "asha", "metric": metric, "lower": lower}
        )

    @pytest.fixture
    def store(self, runs: Path) -> Store:
        store = Store(weights.HOME)
        store.create("rungs")
        return store

    def test_higher_values_of_a_score_go_on(self, store):
        first, worse, better = (self.judge(store) for _ in range(3))
        assert [first(10, 0.5), worse(10, 0.4), better(10, 0.6)] == [False, True, False]
        assert [first(20, 0.1), better(20, 0.0)] == [False, False]  # no rung between 10 and 30
        assert [first(30, 0.5), better(30, 0.4)] == [False, True]
        assert store.run(first.run).tags[RUNGS] == '{"metric": "exact", "rungs": {"10": [10, 0.5], "30": [30, 0.5]}}'

    def test_lower_values_of_a_loss_go_on_beside_runs_of_other_metrics(self, store):
        self.judge(store)(10, 0.0)
        first, worse, better = (self.judge(store, "val_loss", lower=True) for _ in range(3))
        assert [first(10, 0.5), worse(10, 0.6), better(10, 0.4)] == [False, True, False]

    def test_a_training_that_resumed_is_judged_by_the_step_of_the_others(self, store):
        first, second = self.judge(store), self.judge(store)
        assert [first(10, 0.5), second(10, 0.4)] == [False, True]
        resumed = RungJudge(store, second.run, self.CONFIG, {"sweep": "rungs", "pruner": "asha", **SCORE})
        assert resumed(10, 0.4)
        assert not resumed(20, 0.1)  # behind the rung
        assert not resumed(100, 0.0)  # at the end

    def test_runs_that_cannot_be_read_let_it_go_on(self, store, monkeypatch, capsys):
        first, second = self.judge(store), self.judge(store)
        first(10, 0.5)
        monkeypatch.setattr(Store, "summaries", lambda *_: (_ for _ in ()).throw(OSError("no server")))
        assert not second(10, 0.1)
        assert "not judged at step 10, as the runs cannot be read: no server" in capsys.readouterr().err


def message_of(folder: Path, text: str) -> str:
    """What is wrong with a search."""
    tiny.write(folder, "ablations/odd.yaml", text)
    with pytest.raises(SpecError) as raised:
        plan.load("odd")
    return str(raised.value)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("name: optuna", "name: optunna", "no search is called 'optunna'; did you mean 'optuna'"),
        ("startup: 4", "sampler: tpee", "did you mean 'tpe'"),
        ("pruner: asha", "pruner: ahsa", "no pruner is called 'ahsa'; did you mean 'asha'"),
        ("pruner: asha", "pruner: {name: asha, reduction: 1}", "expected int in [2, 100]; the nearest is 2"),
        ("trials: 12", "trials: 0", "the nearest is 1"),
        ("startup: 4", "measure: genval", "search.measure 'genval', which is no metric; did you mean 'geneval'"),
        ("startup: 4", "measure: params_m", "search.measure 'params_m', a cost, which trials have only after"),
        ("startup: 4", "measure: latency_s, direction: lower", "'latency_s', a cost, which trials have only after"),
        ("startup: 4", "measure: fid", "'fid', which 'linear · lr 1e-05' does not measure"),
        ("startup: 4", "measure: psnr", "'psnr', which 'linear · lr 1e-05' does not measure"),
        ("startup: 4", "measure: train_steps", "expected search.direction lower or higher"),
        ("pruner: asha", "pruner: {name: asha, on: latency_s}", "search.pruner.on 'latency_s', a cost"),
        ("pruner: asha", "pruner: {name: asha, on: train_steps}", "search.pruner.on 'train_steps', of which neither"),
        ("pruner: asha", "pruner: {name: asha, on: los}", "search.pruner.on 'los', which is no metric"),
        ("columns:", "common: {trainer.validate_every: 500}\ncolumns:",
         "trainer.validate_every is 500, and trainer.max_steps 27; expected trainer.validate_every 3"),
        ("startup: 4", "measure: exact", "a pruner on exact, which 'linear · lr 1e-05' has only at its end"),
        ("pruner: asha", "pruner: {name: asha, first: 27}", "expected pruner.first at most 26"),
        ("columns:", "common: {trainer.max_seconds: 9}\ncolumns:", "'linear · lr 1e-05' trains for 9 s"),
        ("search: {name: optuna, trials: 12, startup: 4, pruner: asha}", "", "has ranges and no search"),
        ("columns:", "seeds: [0, 1]\ncolumns:", "has a search and seeds [0, 1], expected one"),
        ("columns:", "baseline: linear\ncolumns:", "has a search and baseline; expected no baseline"),
        ("columns:", "combine: zip\ncolumns:", "has a search and combine: zip"),
        ("columns:", "samples: {number: 2, ranges: {sampling.guidance: {low: 1, high: 2}}}\ncolumns:",
         "has a search and samples; expected axes and ranges alone"),
        ("log: true", "step: 2", "has step 2, which is for whole numbers; expected integer: true"),
        ("low: 1.0e-5", "low: 2", "from 2 to 1, expected low below high"),
        ("{system.optimizer.lr:", "{trainer.log_every: {low: 1, high: 5, integer: true}, system.optimizer.lr:",
         "searches trainer.log_every, which changes no result"),
        ("system.optimizer.lr:", "system.optimizer.lrr:", "has no option 'lrr'; did you mean 'lr'"),
    ],
)  # fmt: skip
def test_mistakes_are_told_while_the_plan_loads(folder, old, new, words):
    assert old in SEARCH
    assert words in message_of(folder, SEARCH.replace(old, new, 1))


@pytest.mark.parametrize(
    ("common", "measure"),
    [
        ("eval.measures: [{name: distances, extractor: shapes, metrics: [fid, precision]}]", "fd_shapes"),
        ("eval.measures: [{name: distances, extractor: shapes, metrics: [fid, precision]}]", "precision_shapes"),
        ("eval.fid_weights: weights.pth", "fid"),
        ("eval.measures: [clip_shapes]", "clip_shapes"),
        ("eval.reconstruct: true", "psnr"),
        ("seed: 0", "geneval_counting"),
    ],
)
def test_a_measure_that_the_evaluation_gives_is_accepted(folder, common, measure):
    text = SEARCH.replace("pruner: asha", f"measure: {measure}")
    changed = "" if common == "seed: 0" else f"common: {{{common}}}\n"
    (folder / "weights.pth").write_bytes(b"")
    (folder / "ablations/lr.yaml").write_text(f"{text}{changed}")
    assert plan.load("lr").space is not None


class TestPruningDirection:
    """Which values a worker's judge takes to be better."""

    @staticmethod
    def lower(**options: object) -> bool:
        table = Ablation("t", {}, "tiny", search={"name": "optuna", **options})
        return for_worker("sweep", table)["lower"]

    def test_the_direction_of_the_search_is_that_of_its_measure_under_its_own_name_too(self):
        for pruner in ("asha", {"name": "asha", "on": "mine"}):
            assert not self.lower(measure="mine", direction="higher", pruner=pruner)
            assert self.lower(measure="mine", direction="lower", pruner=pruner)

    def test_another_metric_has_that_of_its_column(self):
        assert self.lower(measure="exact", pruner={"name": "asha", "on": "val_loss"})
        assert not self.lower(measure="val_loss", pruner={"name": "asha", "on": "exact"})


def test_more_trials_than_points_are_refused(folder):
    ranges = "ranges: {system.optimizer.lr: {low: 1.0e-5, high: 1.0, log: true}}"
    message = message_of(folder, SEARCH.replace(ranges, "").replace(", pruner: asha", ""))
    assert "search.trials 12 of 2 points, expected at most as many" in message


def test_a_missing_package_names_its_extra(folder, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"search 'optuna' needs Optuna: pip install 'sana_lab\[search\]'"):
        runner.main("lr", workers=1)
    assert not (weights.HOME / "sweeps/lr").exists()


def test_a_table_before_any_trial_says_what_to_run(folder):
    with pytest.raises(SpecError, match="lr has no trial yet; run: sana-lab ablate lr"):
        runner.write_table("lr")


class TestJudgement:
    """A judge of a real training."""

    @pytest.fixture
    def experiment(self, here: Path) -> dict:
        tiny.write_experiment(Path(), changes={"data.size": 16, "prompts": []})
        return experiments.load("tiny", ["trainer.validate_every=1"])

    def test_validations_are_judged_until_one_stops_the_training(self, experiment):
        judged = []
        judge = Judge("val_loss", lambda step, value: judged.append((step, value)) or step == 2)
        with pytest.raises(Pruned, match="pruned at step 2, with") as raised:
            train.train(experiment, judge=judge)
        assert [step for step, _ in judged] == [1, 2]
        assert judged[-1] == (raised.value.step, raised.value.value)
        assert all(map(math.isfinite, (value for _, value in judged)))
        assert weights.trained(experiment) is None

    def test_points_are_judged_where_the_metric_is_theirs(self, experiment):
        scores = iter([0.1, 0.2, 0.3, 0.4])

        def measure(*_: object) -> dict:
            return {"values": {"exact": {"value": next(scores), "low": 0, "high": 1, "n": 1}}, "per_image": {}}

        experiment["eval"]["every"] = 1
        evaluation = SimpleNamespace(check=lambda *_: None, measure=measure)
        judge = Judge("exact", lambda step, value: value > 0.25)
        with pytest.raises(Pruned, match=r"pruned at step 3, with 0\.3"):
            train.train(experiment, judge=judge, evaluation=evaluation)
        assert [p.step for p in points.read(train.folder(experiment) / points.FILE, experiment)] == [1, 2, 3]


@pytest.mark.slow
def test_a_search_through_worker_processes_is_complete(folder, capsys):
    pytest.importorskip("optuna", reason="Optuna is not installed: pip install 'sana_lab[search]'")
    text = SEARCH.replace("trials: 12, startup: 4", "trials: 4, startup: 2").replace(
        "axes:", "common: {trainer.max_steps: 4}\naxes:"
    )
    (folder / "ablations/lr.yaml").write_text(text.replace("pruner: asha", "pruner: {name: asha, reduction: 2}"))
    assert runner.main("lr", workers=2) == 0
    store = Store(weights.HOME)
    trials = records(store, with_proposals(store, plan.load("lr")))
    assert len(trials) == 4
    assert all(r.complete for r in trials)
    assert all("val_loss" in r.run.metrics for r in trials if r.done)
    assert [r.status for r in store.find("lr") if r.status == "RUNNING"] == []
    assert "Search of 4 trials by optuna" in capsys.readouterr().out
