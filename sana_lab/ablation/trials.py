"""State of a plan's trials: each trial's key and the MLflow run of that key."""

from pathlib import Path

from sana_lab.ablation import efficiency
from sana_lab.ablation.plan import Plan
from sana_lab.ablation.record import TrialRecord
from sana_lab.checkpoints import weights
from sana_lab.config import hashing
from sana_lab.config.memo import reusing
from sana_lab.config.schema import Trial
from sana_lab.tracking.store import Run, Store


def records(store: Store, plan: Plan) -> list[TrialRecord]:
    """Each trial of the plan with its newest run; a finished run counts before any other."""
    runs = runs_by_key(store, plan.name)
    with reusing():
        keys = [keys_of(trial, plan) for trial in plan.trials]
    return [TrialRecord(trial, *k, runs.get(k[0])) for trial, k in zip(plan.trials, keys, strict=True)]


def keys_of(trial: Trial, plan: Plan) -> tuple[str, str]:
    """Key and model of a trial. The key of weights that ship depends on their content; a probe's key depends on the
    device too, and it has no model but itself."""
    if trial.kind == "quality":
        key = hashing.trial_hash(trial)
        return hashing.with_weights(key, trial.weights) if trial.weights else key, hashing.experiment_hash(trial.config)
    return (efficiency.trial_hash(trial, efficiency.device_of(plan.table)),) * 2


def runs_by_key(store: Store, name: str) -> dict[str, Run]:
    """The newest run of each trial of a sweep; a finished run counts before any other."""
    runs: dict[str, Run] = {}
    for run in reversed(store.summaries(name)):
        key = run.tags.get("sana.trial", "")
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
    states = {"FINISHED": "done", "FAILED": f"failed: {record.run.tags.get('sana.error', '')}"}
    return states.get(record.run.status, "unfinished")
