"""State of a plan's trials: each trial's key and the MLflow run of that key."""

import json
from collections.abc import Iterable
from pathlib import Path

from sana_lab.ablation import efficiency
from sana_lab.ablation.plan import Plan
from sana_lab.ablation.record import PRUNED, TRIAL, TrialRecord, was_pruned
from sana_lab.ablation.search.settings import pruning_of
from sana_lab.checkpoints import weights
from sana_lab.config import hashing
from sana_lab.config.memo import reusing
from sana_lab.config.schema import EfficiencyTable, Trial
from sana_lab.tracking.store import Run, Store

CORE, MEASURES = "sana.core", "sana.measures"
"""Tags of a run: hash of its trial without measures that can be appended, and the hashes of those that it has."""


def records(store: Store, plan: Plan) -> list[TrialRecord]:
    """Each trial of the plan with its newest run; a finished run counts before any other.

    A trial without a run has the finished run of the same trial with fewer measures, if there is one.
    """
    every = store.summaries(plan.name)
    runs, pruning = runs_by_key(every), pruning_of(plan.table)
    ended = [run for run in every if run.status == "FINISHED" or was_pruned(run, pruning)]
    with reusing():
        keys = [keys_of(trial, plan) for trial in plan.trials]
        return [
            TrialRecord(trial, *k, runs.get(k[0]) or with_fewer_measures(trial, ended), pruning)
            for trial, k in zip(plan.trials, keys, strict=True)
        ]


def with_fewer_measures(trial: Trial, runs: Iterable[Run]) -> Run | None:
    """Of finished or pruned runs that of the trial with the most of its measures, or with all of them and more; None if
    none is."""
    finished = [run for run in runs if CORE in run.tags]
    if trial.kind != "quality" or not finished:
        return None
    core, measures = core_of(trial), set(hashing.measure_hashes(trial))
    same = [run for run in finished if run.tags[CORE] == core]
    able = [run for run in same if (has := measures_of(run)) <= measures or has >= measures]
    return max(able, key=lambda run: len(measures_of(run) & measures), default=None)


def core_of(trial: Trial) -> str:
    """Hash of a trial without its measures; of weights that ship by their content."""
    core = hashing.core_hash(trial)
    return hashing.with_weights(core, trial.weights) if trial.weights else core


def measures_of(run: Run) -> set[str]:
    """Hashes of the measures that a run was evaluated with."""
    return set(json.loads(run.tags.get(MEASURES, "[]")))


def measure_tags(trial: Trial) -> dict[str, str]:
    """The tags by which a measure can be appended to the trial's finished run later."""
    if trial.kind != "quality":
        return {}
    return {CORE: core_of(trial), MEASURES: json.dumps(sorted(hashing.measure_hashes(trial)))}


def keys_of(trial: Trial, plan: Plan) -> tuple[str, str]:
    """Key and model of a trial. The key of weights that ship depends on their content; a probe's key depends on the
    device too, and it has no model but itself."""
    if trial.kind == "quality":
        key = hashing.trial_hash(trial)
        return hashing.with_weights(key, trial.weights) if trial.weights else key, hashing.experiment_hash(trial.config)
    target = efficiency.target_of(plan.table, plan.elsewhere)
    return (efficiency.trial_hash(trial, None if target is None else target.name),) * 2


def as_timed(store: Store, plan: Plan) -> Plan:
    """An ablation whose rows were timed on other machines, and not on this one, as one of those; else as it is."""
    if not isinstance(plan.table, EfficiencyTable):
        return plan
    if efficiency.device_of(plan.table) is not None and any(r.run for r in records(store, plan)):
        return plan
    others = [plan._replace(elsewhere=devices) for devices in (1, 0)]
    return next((other for other in others if any(r.run for r in records(store, other))), plan)


def runs_by_key(every: Iterable[Run]) -> dict[str, Run]:
    """The newest run of each trial of a sweep, whose runs come newest first; a finished run counts before any other."""
    runs: dict[str, Run] = {}
    for run in reversed(list(every)):
        key = run.tags.get(TRIAL, "")
        if runs.get(key) is None or runs[key].status != "FINISHED":
            runs[key] = run
    return runs


def weights_of(trial: Trial) -> Path | None:
    """The weights to evaluate a trial with; None if it has to be trained."""
    return trial.weights or (weights.trained(trial.config) if trial.retrain else weights.ready(trial.config))


def is_shipped(path: Path) -> bool:
    """Whether a weights file was not trained in this folder."""
    return not path.is_relative_to(weights.HOME)


def state(record: TrialRecord) -> str:
    """State of a trial as text for the dry run."""
    if record.run is None:
        path = weights_of(record.trial) if record.trial.kind == "quality" else None
        return "to run" if path is None else f"{'weights ship' if is_shipped(path) else 'trained'}, to evaluate"
    if record.pruned:
        end = json.loads(record.run.tags[PRUNED])
        return f"pruned at step {end['step']}, {end['metric']} {end['value']:.4g}"
    if record.lacks_measures:
        return "done, measures to append"
    states = {"FINISHED": "done", "FAILED": f"failed: {record.run.tags.get('sana.error', '')}"}
    return states.get(record.run.status, "unfinished")
