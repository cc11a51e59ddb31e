"""State of a plan's trials: each trial's key and the MLflow run of that key."""

from sana_lab.ablation import efficiency
from sana_lab.ablation.plan import Plan
from sana_lab.ablation.record import TrialRecord
from sana_lab.checkpoints import weights
from sana_lab.config import hashing
from sana_lab.config.schema import Trial
from sana_lab.tracking.store import Run, Store


def records(store: Store, plan: Plan) -> list[TrialRecord]:
    """Each trial of the plan with its newest run; a finished run counts before any other."""
    runs = runs_by_key(store, plan.name)
    keys = [keys_of(trial, plan) for trial in plan.trials]
    return [TrialRecord(trial, *k, runs.get(k[0])) for trial, k in zip(plan.trials, keys, strict=True)]


def keys_of(trial: Trial, plan: Plan) -> tuple[str, str]:
    """Key and model of a trial. A probe's key depends on the device too, and it has no model but itself."""
    if trial.kind == "quality":
        return hashing.trial_hash(trial), hashing.experiment_hash(trial.config)
    return (efficiency.trial_hash(trial, efficiency.device_of(plan.table)),) * 2


def runs_by_key(store: Store, name: str) -> dict[str, Run]:
    """The newest run of each trial of a sweep; a finished run counts before any other."""
    runs: dict[str, Run] = {}
    for run in reversed(store.find(name)):
        key = run.tags.get("sana.trial", "")
        if runs.get(key) is None or runs[key].status != "FINISHED":
            runs[key] = run
    return runs


def state(record: TrialRecord) -> str:
    """State of a trial as text for the dry run."""
    if record.run is None:
        trained = record.trial.kind == "quality" and weights.ready(record.trial.config) is not None
        return "trained, to evaluate" if trained else "to run"
    states = {"FINISHED": "done", "FAILED": f"failed: {record.run.tags.get('sana.error', '')}"}
    return states.get(record.run.status, "unfinished")
