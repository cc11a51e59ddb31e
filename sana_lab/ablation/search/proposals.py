"""Proposals of a search and their trials: read from the runs that record them, and made one after the other."""

import contextlib
import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np

from sana_lab.ablation.plan import Plan
from sana_lab.ablation.record import TrialRecord
from sana_lab.ablation.search import Observation, Search, Values
from sana_lab.ablation.search.judging import values_at_rungs
from sana_lab.ablation.search.settings import direction, pruner_of, search_of
from sana_lab.ablation.search.space import SearchSpace
from sana_lab.ablation.trials import records
from sana_lab.config.schema import Trial
from sana_lab.config.specs import SpecError, nearest
from sana_lab.tracking.store import Run, Store
from sana_lab.training.checks import check

VALUES, NUMBER = "sana.values", "sana.number"
"""Tags of a run that a search proposed: its point as JSON, and its place among the proposals, from 0."""

ATTEMPTS, FINITE_ATTEMPTS = 100, 20
"""Most points that a search is asked for one proposal; in a finite space its other points follow, in random order."""

LISTED = 10_000
"""Most points of a finite space that are listed for one proposal."""

Begin = Callable[[TrialRecord, dict[str, object]], Run]
"""Starts the run of a trial, or takes up the one it has, with tags."""


def with_proposals(store: Store, plan: Plan) -> Plan:
    """The plan with the trials that its search has proposed so far, in their order; any other plan as it is.

    A run counts if its point is in the space and gives its trial under the file as it is now.
    """
    if plan.space is None:
        return plan
    trials: dict[str, Trial] = {}
    for values in _recorded(store, plan, plan.space):
        with contextlib.suppress(SpecError):  # a point that the file, as it is now, cannot build any more
            trials[json.dumps(values)] = plan.space.trial(values)
    expanded = plan._replace(trials=list(trials.values()))
    return expanded._replace(trials=[r.trial for r in records(store, expanded) if r.run and VALUES in r.run.tags])


def _recorded(store: Store, plan: Plan, space: SearchSpace) -> list[Values]:
    """The points of the runs, in the order of their proposals."""
    runs = [run for run in store.summaries(plan.name) if VALUES in run.tags]
    runs.sort(key=lambda run: (int(run.tags.get(NUMBER, 0)), run.started))
    return [values for run in runs if space.contains(values := json.loads(run.tags[VALUES]))]


def observe(record: TrialRecord, search: Search, values: Values) -> Observation:
    """A trial as its search sees it. SpecError for one that has finished without the measure."""
    run = record.run
    assert run is not None
    if record.pruned:
        pruner = pruner_of(search)
        metric = (pruner.on if pruner else None) or search.measure
        same = metric == search.measure  # values of another metric say nothing of this one
        return Observation(values, "pruned", rungs=values_at_rungs(run, metric) if same else {})
    if record.lacks_measures and search.measure not in run.metrics:
        return Observation(values, "running")  # which are being appended
    if record.done or record.evaluated:
        if search.measure not in run.metrics:
            raise SpecError(
                f"{record.trial.label!r} has finished without {search.measure!r}, which its search decides by; "
                f"{nearest(search.measure, [name for name in run.metrics if '/' not in name])}"
            )
        value = run.metrics[search.measure]
        return Observation(values, "finished", value) if math.isfinite(value) else Observation(values, "failed")
    return Observation(values, "failed" if run.status == "FAILED" else "running")


class Explorer:
    """Proposes trials until the search has its number of them; several threads may ask."""

    def __init__(self, store: Store, plan: Plan, begin: Begin) -> None:
        search = search_of(plan.table)
        assert search is not None
        assert plan.space is not None
        self.store, self.plan, self.space, self.search, self.begin = store, plan, plan.space, search, begin
        self.lower = direction(search) == "lower"
        self.records = records(store, plan)
        self.points = _recorded_of(store, plan, self.records)
        self.lock = threading.Lock()
        self.ended = False

    @property
    def remaining(self) -> int:
        """Trials to propose."""
        return max(0, self.search.trials - len(self.records))

    def next(self) -> TrialRecord | None:
        """The next trial that has something to do, with its run; None at the end of the search, also where no point is
        left, which a printed line tells.

        SpecError for trials without the measure, and where none of the first points can be built."""
        with self.lock:
            try:
                while self.remaining and not self.ended:
                    record = self._propose()
                    if record is None:
                        self.ended = True
                    elif not record.complete:
                        return record
            except BaseException:
                self.ended = True
                raise
            return None

    def _propose(self) -> TrialRecord | None:
        self._refresh()
        history = [observe(r, self.search, v) for r, v in zip(self.records, self.points, strict=True)]
        keys, reason = {record.key for record in self.records}, "all have a trial"
        for values in self._candidates(history):
            if self.space.excludes(values) or values in self.points:
                continue
            try:
                record = self._record(self.space.trial(values))
                check(record.trial.config, self.plan.training_devices)
            except SpecError as error:
                reason = str(error)
                continue
            if record.key not in keys:
                return self._start(record, values)
        if not self.records:
            raise SpecError(f"{self.plan.name}: no point gives a trial: {reason}; expected other axes or ranges")
        print(
            f"{self.plan.name}: the search ends after {len(self.records)} of {self.search.trials} trials, as no other "
            f"point was found: {reason}"
        )
        return None

    def _candidates(self, history: Sequence[Observation]) -> Iterator[Values]:
        """Points of the search, and then of a finite space all others in random order."""
        finite = math.isfinite(self.space.size)
        for attempt in range(FINITE_ATTEMPTS if finite else ATTEMPTS):
            yield self.search.propose(self.space.choices, history, attempt, lower=self.lower)
        if finite:
            points = list(islice(self.space.points(), LISTED))
            yield from (points[i] for i in np.random.default_rng(len(history)).permutation(len(points)))

    def _record(self, trial: Trial) -> TrialRecord:
        """A trial with the run that it has already, as a grid of the same name may have trained it."""
        return records(self.store, self.plan._replace(trials=[trial]))[0]

    def _start(self, record: TrialRecord, values: Values) -> TrialRecord:
        tags: dict[str, object] = {VALUES: json.dumps(values), NUMBER: len(self.records)}
        record = record._replace(run=self.begin(record, tags))
        self.records.append(record)
        self.points.append(values)
        return record

    def _refresh(self) -> None:
        """Give each record the present state of its run; one whose run was deleted is dropped."""
        runs = {run.id: run for run in self.store.summaries(self.plan.name)}
        pairs = [(r, v) for r, v in zip(self.records, self.points, strict=True) if r.run_id in runs]
        self.records = [record._replace(run=runs[record.run_id]) for record, _ in pairs]
        self.points = [values for _, values in pairs]


def _recorded_of(store: Store, plan: Plan, trials: Sequence[TrialRecord]) -> list[Values]:
    """The points of records, which all have a run with them."""
    points = {run.id: run.tags[VALUES] for run in store.summaries(plan.name) if VALUES in run.tags}
    return [json.loads(points[record.run_id]) for record in trials]
