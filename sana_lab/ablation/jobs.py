"""The stages of a sweep as jobs for worker processes: train what trials need, evaluate trials, measure their costs."""

from collections.abc import Iterable, Iterator, Sequence
from graphlib import TopologicalSorter

import torch

from sana_lab.ablation.pool import WorkerPool
from sana_lab.ablation.protocol import Job, Kind
from sana_lab.ablation.record import TrialRecord
from sana_lab.checkpoints import weights
from sana_lab.config import experiments, schema
from sana_lab.tracking.store import Store
from sana_lab.types import Json


class Jobs:
    """Run each stage of a sweep in a worker process; if a worker dies, its open runs are marked as failed."""

    def __init__(self, store: Store, pool: WorkerPool, device: str | None, pruning: Json | None = None) -> None:
        self.store, self.pool = store, pool
        self.device = device  # that probes are timed on
        self.pruning = pruning  # how a worker prunes, in a search
        self.threads, self.whole = pool.executor.threads, pool.executor.whole
        self.untrainable: dict[str, str] = {}  # experiment -> why it could not be trained

    def train(self, experiment: str) -> None:
        """Train an experiment that trials take weights from; if that fails, those trials are blocked."""
        if reason := self._blocked(experiments.load(experiment)):
            self.untrainable[experiment] = reason
            return
        title = f"train-{experiment.replace('/', '-')}"
        if self.pool.run(title, self._job("train", [], experiment=experiment)):
            reason = f"training {experiment!r}, which it takes weights from, failed; see {self.pool.log(title)}"
            self.untrainable[experiment] = reason

    def blocked(self, record: TrialRecord) -> bool:
        """Whether a trial takes weights that could not be trained; its run then ends as FAILED."""
        reason = self._blocked(record.trial.config)
        if reason:
            fail(self.store, record.run_id, reason)
        return reason is not None

    def evaluate(self, group: list[TrialRecord]) -> None:
        """Train the model that these trials share, and evaluate each of them."""
        title = group[0].model
        self.end(group, self.pool.run(title, self._job("evaluate", group)), title)

    def append(self, group: list[TrialRecord]) -> None:
        """Evaluate finished trials that share a model with the measures that they lack; errors leave them as they are.

        A run that takes weights which could not be trained is left as it is too."""
        able = [r for r in group if not self._blocked(r.trial.config)]
        if able:
            self.pool.run(f"append-{able[0].model}", self._job("append", able))

    def evaluate_alone(self, group: list[TrialRecord]) -> None:
        """Train and evaluate with all cores, while nothing else runs."""
        job = self._job("evaluate", group)._replace(threads=self.whole)
        self.end(group, self.pool.run(group[0].model, job), group[0].model)

    def measure(self, group: list[TrialRecord]) -> None:
        """Measure the costs of trials, one after the other, with all cores."""
        if group:
            probes = group[0].trial.kind == "efficiency"
            here = probes and not self.pool.executor.elsewhere
            threads = torch.get_num_threads() if here else self.whole  # a probe's key names this machine's threads
            self.end(group, self.pool.run("bench", self._job("measure", group)._replace(threads=threads)), "bench")

    def end(self, group: Iterable[TrialRecord], status: int, title: str) -> None:
        """Fail the runs that a worker left open when it died."""
        if not status or self.pool.stopped:
            return
        for record in group:
            if self.store.run(record.run_id).status == "RUNNING":
                reason = f"its process ended with status {status}; see {self.pool.log(title)}"
                fail(self.store, record.run_id, reason)

    def _job(self, kind: Kind, group: Sequence[TrialRecord], experiment: str | None = None) -> Job:
        pruning = {"pruning": self.pruning} if self.pruning else {}
        trials = [
            {"run": r.run_id, "key": r.key, "label": r.trial.label, **for_worker(r.trial), **pruning} for r in group
        ]
        home, elsewhere = str(self.store.home), self.pool.executor.elsewhere
        return Job(kind, home, self.threads, trials, experiment, device=self.device, elsewhere=elsewhere)

    def _blocked(self, experiment: schema.Config) -> str | None:
        return next((self.untrainable[n] for n in experiments.prerequisites(experiment) if n in self.untrainable), None)


def for_worker(trial: schema.Trial) -> Json:
    """What a worker does of a trial, as plain data."""
    path = None if trial.weights is None else str(trial.weights)
    return {"kind": trial.kind, "config": trial.config, "weights": path, "retrain": trial.retrain}


def fail(store: Store, run_id: str, reason: str) -> None:
    store.set_tags(run_id, {"sana.error": reason})
    store.finish(run_id, "FAILED")


def by_model(group: Sequence[TrialRecord]) -> list[list[TrialRecord]]:
    models: dict[str, list[TrialRecord]] = {}
    for record in group:
        models.setdefault(record.model, []).append(record)
    return list(models.values())


def untrained(group: Sequence[TrialRecord]) -> list[str]:
    """Experiments that trials or their measures take weights from, directly or in turn, and that are neither trained
    nor shipped."""
    configs = [r.trial.config for r in group]
    judges = (name for config in configs for name in experiments.referenced(config["eval"]["measures"]))
    names = dict.fromkeys([*(name for config in configs for name in experiments.prerequisites(config)), *judges])
    return [name for name in names if weights.ready(experiments.load(name)) is None]


def in_order(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Experiments in groups, each of which needs weights only of the groups before it."""
    order = TopologicalSorter({n: set(experiments.prerequisites(experiments.load(n))) & set(names) for n in names})
    order.prepare()
    while group := order.get_ready():
        yield group
        order.done(*group)
