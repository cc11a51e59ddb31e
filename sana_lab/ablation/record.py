"""A trial of an ablation and the MLflow run that records it."""

import json
from collections.abc import Sequence
from typing import NamedTuple

from sana_lab.config.schema import Trial
from sana_lab.tracking.store import Run
from sana_lab.types import Json

EVALUATED = "sana.judged"
"""Tag of a run whose quality has been measured and whose costs may be missing; its value is the trial's key."""

SHIPPED = "sana.shipped"
"""Tag of a run whose weights ship: where and how they were trained, as JSON."""

RUNGS = "sana.rungs"
"""Tag of a run with what its search's pruner compared: {metric, rungs: {rung: [step, value]}} as JSON."""

PRUNED = "sana.pruned"
"""Tag of a run that its search's pruner ended: {step, value, metric} as JSON."""

THUMBNAILS = "thumbnails.json"
"""Artifact of a run: prompt of the evaluation -> its first image, small, as WebP in base64."""

TRIAL = "sana.trial"
"""Tag of a run with the key of its trial."""


class TrialRecord(NamedTuple):
    """A trial and the run that records it, if there is one."""

    trial: Trial
    key: str  # hash of everything that its numbers depend on
    model: str  # hash of what is trained; trials that share it are trained once
    run: Run | None
    pruning: str | None = None  # metric that the pruner of the present table compares; None without a pruner

    @property
    def run_id(self) -> str:
        """Of a trial that has a run."""
        assert self.run is not None
        return self.run.id

    @property
    def done(self) -> bool:
        return self.run is not None and self.run.status == "FINISHED"

    @property
    def lacks_measures(self) -> bool:
        """Whether its finished run is that of the same trial with fewer measures, which are to be appended."""
        return self.run is not None and self.done and self.run.tags.get(TRIAL, self.key) != self.key

    @property
    def pruned(self) -> bool:
        """Whether the pruner of its search ended its training, which is then not taken up again."""
        return self.run is not None and was_pruned(self.run, self.pruning)

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.pruned or (self.done and not self.lacks_measures)

    @property
    def evaluated(self) -> bool:
        return self.run is not None and self.run.tags.get(EVALUATED) == self.key

    def for_table(self) -> Json:
        """The record that `report.table.build_table` takes."""
        status = {"FINISHED": "finished", "FAILED": "failed"}.get(self.run.status if self.run else "", "missing")
        status = "pruned" if self.pruned else status
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


def was_pruned(run: Run, metric: str | None) -> bool:
    """Whether a pruner ended a run by this metric: that of the present table, as without its pruner the run counts as
    interrupted."""
    end = run.tags.get(PRUNED)
    return run.status == "KILLED" and end is not None and bool(json.loads(end)["metric"] == metric)


EXACT = "exact"
"""Tier of images that every block computes in every step, in the precision of the weights."""


def tier(trial: Trial, oracle: bool = False) -> str:
    """The tier of a trial's images: exact, or the approximations of its sampling and whether an oracle chose them."""
    sampling = trial.config.get("sampling") or {}
    others = {
        "step cache": sampling.get("cache") is not None,
        "quantised": sampling.get("quantize", "none") != "none",
        "oracle": oracle,
    }
    return ", ".join(name for name, applies in others.items() if applies) or EXACT


def within_time(trial: Trial) -> bool:
    """Whether a trial is trained for a time, not for a number of steps."""
    return trial.kind == "quality" and trial.config["trainer"]["max_seconds"] is not None


def machine(environment: Json) -> str:
    """The device of a card's environment: a GPU, or the processor and its cores."""
    device = environment.get("device", "cpu")
    return f"{environment.get('cores')} x {environment.get('cpu')}" if device == "cpu" else str(device)


def equal_rows(trials: Sequence[TrialRecord]) -> list[str]:
    """A line on each set of labels whose settings are equal: they are one trial, and no comparison."""
    labels: dict[str, dict[str, None]] = {}
    for record in trials:
        labels.setdefault(record.key, {})[record.trial.label] = None
    rows = dict.fromkeys(tuple(group) for group in labels.values() if len(group) > 1)
    return [f"Rows {', '.join(map(repr, group))} have equal settings: one trial, run once." for group in rows]
