"""Two folders with a sweep of one name on one server: the second is refused, and changes nothing of the first."""

import re
import time
from functools import partial
from pathlib import Path

import pytest
import tiny
from stand_in_server import ADDRESS, Server

from sana_lab.ablation import generations, heartbeat, plan, runner
from sana_lab.ablation.executors.local import Local
from sana_lab.ablation.heartbeat import BEAT, Heartbeat, beats, check_alone
from sana_lab.ablation.plan import Plan
from sana_lab.tracking.store import Store
from sana_lab.tracking.view import STATE

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")

ROWS = """
title: Attention
base: tiny
axes:
  attention:
    softmax: {system.dit.attention: softmax}
    linear: {system.dit.attention: linear}
"""
OTHER = ROWS.replace("linear: {system.dit.attention: linear}", "deep: {system.dit.depth: 2}")
RENAMED = ROWS.replace("linear:", "of the kernel:", 1)


@pytest.fixture
def first(server: Server, here: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A folder whose sweep has begun: no job has started, so that all trials wait."""
    tiny.write_experiment(here)
    monkeypatch.setattr(heartbeat, "user", lambda: "ana")
    monkeypatch.setattr(heartbeat.socket, "gethostname", lambda: "host7")
    store = server.store("first/runs")
    begin(store, load(ROWS))
    return store


def load(text: str) -> Plan:
    """The ablation of this text, in every folder under one name."""
    tiny.write(Path(), "ablations/attention.yaml", text)
    return plan.load("attention")


def begin(store: Store, ablation: Plan) -> None:
    """Start the sweep's run and its trials, as `run` does before the first job."""
    parent = runner.sweep_run(store, ablation)
    for record in generations.refresh(store, ablation):
        runner.trial_run(store, ablation.name, parent, record, [])


def states(store: Store) -> list[tuple[str, str, str]]:
    """Name, status and state of each run of the sweep, and the sweep's own, by name."""
    return sorted((run.name, run.status, run.tags.get(STATE, "")) for run in store.find("attention"))


def silence(store: Store, seconds: float) -> None:
    """As if the last sign of life of each run were so long ago."""
    for run in store.find("attention"):
        if BEAT in run.tags:
            store.set_tags(run.id, {BEAT: f"{time.time() - seconds:.0f}"})


@pytest.mark.parametrize("text", [ROWS, OTHER], ids=["equal trials", "other trials"])
def test_the_second_is_refused_and_changes_nothing(first: Store, server: Server, monkeypatch, text: str):
    monkeypatch.setattr(runner, "work_off", lambda *_: pytest.fail("it works"))
    before = states(first)
    assert [state[1:] for state in before] == [("RUNNING", ""), ("RUNNING", "current"), ("RUNNING", "current")]
    words = f"an ablation named 'attention' runs on {ADDRESS} from another folder: by ana on host7, process "
    with pytest.raises(ValueError, match=re.escape(words) + r"\d+, sign of life \d s ago; wait for its end .*copy of"):
        runner.run(server.store("second/runs"), load(text), Local(workers=1))
    assert states(first) == before


def test_a_trial_that_outlives_its_sweep_counts_too(first: Store, server: Server):
    silence(first, 1000)
    second = server.store("second/runs")
    check_alone(second, "attention")
    trial = first.find("attention", {"sana.kind": "trial"})[0]
    with Heartbeat(first, [trial.id], 0.01):
        wait_for_beat(first, trial.id)
    with pytest.raises(ValueError, match="by ana on host7"):
        check_alone(second, "attention")


def wait_for_beat(store: Store, run: str) -> None:
    end = time.monotonic() + 20
    while not beats(store.run(run)) and time.monotonic() < end:
        time.sleep(0.01)


def test_the_first_folder_goes_on_and_one_that_was_killed_gives_way(first: Store, server: Server, monkeypatch):
    monkeypatch.setattr(runner, "work_off", lambda *_: None)
    runner.run(first, load(ROWS), Local(workers=1))
    silence(first, 1000)
    second = server.store("second/runs")
    runner.run(second, load(OTHER), Local(workers=1))
    assert [state[1:] for state in states(second) if "linear" in state[0]] == [("KILLED", "superseded")]


def test_a_sweep_shows_life_while_its_trials_wait(first: Store, monkeypatch):
    sweep = first.find("attention", {"sana.kind": "sweep"})[0].id
    shown: list[bool] = []

    def wait(*_: object) -> None:
        silence(first, 1000)
        wait_for_beat(first, sweep)
        shown.append(beats(first.run(sweep)))

    monkeypatch.setattr(runner, "Heartbeat", partial(Heartbeat, seconds=0.01))
    monkeypatch.setattr(runner, "work_off", wait)
    runner.run(first, load(ROWS), Local(workers=1))
    assert shown == [True]


@pytest.mark.parametrize("text", [OTHER, RENAMED], ids=["other trials", "another label"])
def test_a_table_of_another_file_is_refused_and_one_of_the_same_is_read(first: Store, server: Server, text: str):
    second, before = server.store("second/runs"), states(first)
    assert len(generations.refresh(second, load(ROWS))) == 2
    with pytest.raises(ValueError, match="from another folder: by ana"):
        generations.refresh(second, load(text))
    assert states(first) == before


def test_two_that_begin_at_once_do_not_both_work(first: Store, server: Server, monkeypatch):
    """The second passes the check before the first has begun."""
    silence(first, 1000)
    second, sweep_run = server.store("second/runs"), runner.sweep_run

    def overtaken(store: Store, ablation: Plan) -> str:
        parent = sweep_run(store, ablation)
        sweep_run(first, ablation)
        return parent

    monkeypatch.setattr(runner, "sweep_run", overtaken)
    monkeypatch.setattr(runner, "work_off", lambda *_: pytest.fail("it works"))
    with pytest.raises(ValueError, match="from another folder"):
        runner.run(second, load(ROWS), Local(workers=1))
