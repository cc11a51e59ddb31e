"""Judging trainings of a search at rungs, in the worker that trains: by what other runs recorded at the same step."""

import json
import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sana_lab.ablation.pruners import Pruner
from sana_lab.ablation.record import PRUNED, RUNGS
from sana_lab.ablation.search.settings import rungs_of, watched
from sana_lab.config import specs
from sana_lab.config.schema import Config
from sana_lab.tracking.store import Run, Store
from sana_lab.tracking.view import CURRENT, STATE
from sana_lab.types import Json

if TYPE_CHECKING:
    from sana_lab.training.pruned import Pruned


class RungJudge:
    """Judges one training: at the first step from each rung on that has a value, against the runs that have passed it.

    A store that does not answer there lets the training go on to the next rung.
    """

    def __init__(self, store: Store, run: str, config: Config, options: Json) -> None:
        self.store, self.run, self.sweep, self.metric = store, run, options["sweep"], options["metric"]
        self.pruner: Pruner = specs.build("pruner", options["pruner"])
        self.sign = 1.0 if options["lower"] else -1.0
        self.rungs = judged_steps(self.pruner, config, self.metric)

    def __call__(self, step: int, value: float) -> bool:
        """Whether the training ends here."""
        if (rung := self.rungs.get(step)) is None:
            return False
        try:
            return self._judge(self.store.with_patience(0), rung, step, value)
        except Exception as error:  # of any kind of store
            print(f"sana-lab: not judged at step {step}, as the runs cannot be read: {error}", file=sys.stderr)
            return False

    def _judge(self, store: Store, rung: int, step: int, value: float) -> bool:
        passed = passed_rungs(store.run(self.run), self.metric)
        passed[rung] = (step, value)
        store.set_tags(self.run, {RUNGS: json.dumps({"metric": self.metric, "rungs": passed})})
        others = [
            self.sign * each[rung][1]
            for run in store.summaries(self.sweep)
            if run.id != self.run
            and run.tags.get(STATE, CURRENT) == CURRENT
            and rung in (each := passed_rungs(run, self.metric))
        ]
        return self.pruner.stops(self.sign * value, others)


def judged_steps(pruner: Pruner, config: Config, metric: str) -> dict[int, int]:
    """Step at which the metric is known -> the rung that is judged there, before the end of the training."""
    steps, last = watched(config, metric), config["trainer"]["max_steps"]
    firsts = ((min((s for s in steps if s >= rung), default=last), rung) for rung in rungs_of(pruner, config, metric))
    return {step: rung for step, rung in firsts if step < last}


def passed_rungs(run: Run, metric: str) -> dict[int, tuple[int, float]]:
    """Rung -> (step, value) of a run; empty where it was judged by another metric, or not yet."""
    record = json.loads(run.tags.get(RUNGS, "{}"))
    if record.get("metric") != metric:
        return {}
    return {int(rung): (step, value) for rung, (step, value) in record["rungs"].items()}


def values_at_rungs(run: Run, metric: str) -> dict[int, float]:
    """Step -> value of the rungs of a run, those that are finite."""
    return {step: v for step, v in passed_rungs(run, metric).values() if math.isfinite(v)}


def end(store: Store, run: str, metric: str, pruned: "Pruned") -> None:
    """End the run of a training that was pruned: as KILLED, since MLflow has no status for it, with a tag."""
    record: Mapping[str, Any] = {"step": pruned.step, "value": pruned.value, "metric": metric}
    store.set_tags(run, {PRUNED: json.dumps(record)})
    store.finish(run, "KILLED")
