"""Which trials of a plan have been run: each trial's key, and the MLflow run of that key."""

from typing import NamedTuple

from sana_lab.ablation import efficiency
from sana_lab.ablation.plan import Plan
from sana_lab.checkpoints import weights
from sana_lab.config import hashing
from sana_lab.config.schema import Trial
from sana_lab.tracking.store import Run, Store
from sana_lab.types import Json

EVALUATED = "sana.judged"
"""Tag of a run whose quality has been measured and whose costs may be missing; its value is the trial's key."""


class TrialRecord(NamedTuple):
    """A trial and the run that records it, if there is one."""

    trial: Trial
    key: str  # hash of everything that its numbers depend on
    model: str  # hash of what is trained; trials that share it are trained once
    run: Run | None

    @property
    def run_id(self) -> str:
        """Of a trial that has a run."""
        assert self.run is not None
        return self.run.id

    @property
    def done(self) -> bool:
        return self.run is not None and self.run.status == "FINISHED"

    @property
    def evaluated(self) -> bool:
        return self.run is not None and self.run.tags.get(EVALUATED) == self.key

    @property
    def state(self) -> str:
        """For the dry run."""
        if self.run is None:
            trained = self.trial.kind == "quality" and weights.ready(self.trial.config) is not None
            return "trained, to evaluate" if trained else "to run"
        states = {"FINISHED": "done", "FAILED": f"failed: {self.run.tags.get('sana.error', '')}"}
        return states.get(self.run.status, "unfinished")

    def for_table(self) -> Json:
        """The record that `report.table.build_table` takes."""
        status = {"FINISHED": "finished", "FAILED": "failed"}.get(self.run.status if self.run else "", "missing")
        trial = {"label": self.trial.label, "labels": self.trial.labels, "seed": self.trial.seed, "status": status}
        if self.run is None:
            return {**trial, "error": None, "metrics": {}, "run_id": None, "commit": None}
        commit = self.run.tags.get("commit")
        dirty = "-dirty" if self.run.tags.get("dirty", "").lower() == "true" else ""
        return {
            **trial,
            "error": self.run.tags.get("sana.error"),
            "metrics": self.run.metrics,
            "run_id": self.run.id,
            "commit": f"{commit}{dirty}" if commit else None,
        }


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
