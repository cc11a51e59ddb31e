"""Runs of a sweep that follow its file: renamed labels, trials that are no longer in it, measures that came later."""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from sana_lab.ablation import parameters
from sana_lab.ablation.heartbeat import check_alone
from sana_lab.ablation.plan import Plan
from sana_lab.ablation.record import TRIAL, TrialRecord
from sana_lab.ablation.trials import MEASURES, measure_tags, measures_of, records
from sana_lab.config import hashing
from sana_lab.config.memo import reusing
from sana_lab.config.schema import Trial
from sana_lab.tracking.store import Run, Store
from sana_lab.tracking.view import CURRENT, STATE

SUPERSEDED = "superseded"
"""Value of a run's tag STATE for a trial that is no longer in the ablation; views and tables show current runs only."""

LABEL, LABEL_OF = "sana.label", "label."
"""Tag with a run's row, and the beginning of the tags with its labels on the axes."""

SEED = "sana.seed"
"""Tag with the seed of a run's trial."""


def run_name(trial: Trial) -> str:
    """The name of a trial's run: its label, and its seed where it is not 0."""
    return trial.label if trial.seed == 0 else f"{trial.label} (seed {trial.seed})"


def refresh(store: Store, plan: Plan) -> list[TrialRecord]:
    """The trials with their runs, after these follow the plan: names, labels, parameters and state. Prints changes.

    ValueError where labels or trials would change of a sweep that another folder works on.
    """
    trials = records(store, plan)
    whole = {run.id: run for run in store.summaries(plan.name) if run.tags.get("sana.kind") == "trial"}
    others = at_other_seeds(store, plan, whole.values())
    by_run = {r.run_id: r._replace(run=whole.get(r.run_id, r.run)) for r in reversed([*trials, *others]) if r.run}
    outdated = [run for run in whole.values() if is_outdated(run, by_run, plan)]
    if outdated or any(map(is_renamed, by_run.values())):
        check_alone(store, plan.name)
    with reusing():
        keys = parameters.differing(plan.trials) if by_run else []
        renamed = {line: None for r in by_run.values() if (line := follow(store, r, keys))}
    for run in outdated:
        store.set_tags(run.id, {STATE: SUPERSEDED})
    lines = [*renamed, *superseded(outdated)]
    print("".join(f"{plan.name}: {line}\n" for line in [*lines, *left_out(others)]), end="")
    return records(store, plan) if lines or by_run else trials


def at_other_seeds(store: Store, plan: Plan, runs: Iterable[Run]) -> list[TrialRecord]:
    """The trials of the plan, as it is now, at further seeds that current runs have: those of `--seeds`."""
    tags = [run.tags for run in runs if run.tags.get(STATE) != SUPERSEDED]
    seeds = {int(text) for each in tags if (text := each.get(SEED, "")).isdecimal()} - {t.seed for t in plan.trials}
    if plan.at_seeds is None or not seeds:
        return []
    with reusing():
        plans = [plan.at_seeds([seed]) for seed in sorted(seeds)]  # one by one, as a plan has a largest size
        return [record for each in plans for record in records(store, each) if record.run is not None]


def left_out(others: Sequence[TrialRecord]) -> Iterator[str]:
    """A line on the runs of other seeds than the plan has."""
    if others:
        seeds = ",".join(map(str, sorted({record.trial.seed for record in others})))
        yield f"{len(others)} runs of seeds {seeds} are kept, and shown with --seeds alone"


def follow(store: Store, record: TrialRecord, keys: Sequence[str]) -> str:
    """Give a trial's run the labels, parameters and tags of the plan; the line to print if it had another label."""
    run, trial = record.run, record.trial
    assert run is not None
    old = run.tags.get(LABEL, trial.label)
    tags = {LABEL: trial.label, STATE: CURRENT, **{f"{LABEL_OF}{axis}": text for axis, text in trial.labels.items()}}
    tags |= identity(record)
    if changed := {k: v for k, v in tags.items() if run.tags.get(k) != v}:
        store.set_tags(run.id, changed)
    if old != trial.label:
        store.rename(run.id, run_name(trial))
    axes = parameters.axes_of(trial)
    if axes != {k: v for k, v in run.params.items() if k.startswith(parameters.AXIS)}:
        store.replace_params(run.id, parameters.AXIS, axes)
    options = {k: v for k, v in parameters.of_trial(trial, keys).items() if not k.startswith(parameters.AXIS)}
    if options.keys() - run.params.keys():
        store.log_params(run.id, {}, options)
    return f"{old!r} is now called {trial.label!r}" if old != trial.label else ""


def is_renamed(record: TrialRecord) -> bool:
    """Whether a trial's run has another label than the trial."""
    return record.run is not None and record.run.tags.get(LABEL, record.trial.label) != record.trial.label


def identity(record: TrialRecord) -> dict[str, str]:
    """Tags of a run that has every measure of the trial, perhaps more: those by which it is identified later."""
    run, trial = record.run, record.trial
    assert run is not None
    if trial.kind != "quality" or not run.tags.get(TRIAL):
        return {}
    if run.tags[TRIAL] == record.key:
        return {k: v for k, v in measure_tags(trial).items() if k not in run.tags}
    return {TRIAL: record.key} if measures_of(run) >= set(hashing.measure_hashes(trial)) else {}


def is_outdated(run: Run, current: dict[str, TrialRecord], plan: Plan) -> bool:
    """Whether a run that is not marked yet is of no trial of the plan. A probe's run on another device, under a label
    that exists, is not."""
    if run.id in current or run.tags.get(STATE) == SUPERSEDED:
        return False
    labels = {trial.label for trial in plan.trials if trial.kind == "efficiency"}
    return run.tags.get(LABEL) not in labels


def superseded(runs: Sequence[Run]) -> Iterator[str]:
    """A line on each row whose runs are no longer shown."""
    labels = [run.tags.get(LABEL, run.name) for run in runs]
    for label in dict.fromkeys(labels):
        n = labels.count(label)
        yield f"{n} {'run' if n == 1 else 'runs'} of {label!r} superseded, hidden from table and view"


def appended_tags(record_key: str, trial: Trial, has: set[str]) -> dict[str, Any]:
    """Tags of a run after measures were appended to it."""
    return {TRIAL: record_key, MEASURES: json.dumps(sorted(has | set(hashing.measure_hashes(trial))))}
