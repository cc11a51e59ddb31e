"""Which trials of an ablation have been run: the question that MLflow answers."""

from collections.abc import Sequence
from typing import NamedTuple

from sana_lab.checkpoints import weights
from sana_lab.config import hashing
from sana_lab.config.schema import Trial
from sana_lab.tracking.store import Run, Store


class Item(NamedTuple):
    """A trial and the run that records it, if there is one."""

    trial: Trial
    key: str
    model: str
    run: Run | None

    @property
    def done(self) -> bool:
        return self.run is not None and self.run.status == "FINISHED"

    @property
    def judged(self) -> bool:
        return self.run is not None and self.run.tags.get("sana.judged") == self.key

    @property
    def state(self) -> str:
        if self.run is None:
            return "to run" if weights.ready(self.trial.experiment) is None else "trained, to judge"
        return {"FINISHED": "done", "FAILED": f"failed: {self.run.tags.get('sana.error', '')}"}.get(
            self.run.status, "unfinished"
        )


def items(store: Store, name: str, trials: Sequence[Trial]) -> list[Item]:
    """Each trial with its newest run, a finished one first."""
    runs = runs_by_key(store, name)
    keyed = [(trial, hashing.trial_hash(trial)) for trial in trials]
    return [Item(trial, key, hashing.experiment_hash(trial.experiment), runs.get(key)) for trial, key in keyed]


def runs_by_key(store: Store, name: str) -> dict[str, Run]:
    """The newest run of each trial of a sweep, a finished one first."""
    runs: dict[str, Run] = {}
    for found in reversed(store.find(name)):
        key = found.tags.get("sana.trial", "")
        if runs.get(key) is None or runs[key].status != "FINISHED":
            runs[key] = found
    return runs
