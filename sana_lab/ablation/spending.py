"""What an ablation will cost, for its dry run: the trainings that are missing, their memory, disk and hours."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sana_lab.ablation.executors import Executor
from sana_lab.ablation.jobs import untrained
from sana_lab.ablation.plan import Plan
from sana_lab.ablation.record import TrialRecord, within_time
from sana_lab.ablation.search import describing
from sana_lab.ablation.trials import records, weights_of
from sana_lab.bench import fit
from sana_lab.bench.fit import Training
from sana_lab.config import experiments
from sana_lab.config.memo import reusing
from sana_lab.costs.too_large import GIB
from sana_lab.tracking.store import Store
from sana_lab.training import fits

if TYPE_CHECKING:
    from sana_lab.bench.training_cost import TrainingCost

MOST_SYSTEMS = 50
"""Most different trainings whose cost is computed; each takes some tens of milliseconds or more."""


def estimate(trials: Sequence[TrialRecord], place: Executor, more: int = 0) -> list[str]:
    """Lines on the trainings to do, and on what this machine lacks for them; empty if there are none. `more` trainings
    cost as much as the mean of these."""
    missing = [record for record in to_train(trials) if not within_time(record.trial)]
    with reusing():
        costs, count = [each.cost for each in trainings(missing, place)], len(missing) + more
        here = fit.lines(all_trainings(trials, place), place.slots) if not place.elsewhere else []
    return [*([_line(costs, count, place.slots), *_times(costs, count, place.slots)] if costs else []), *here]


def check(store: Store, ablation: Plan, place: Executor) -> None:
    """SpecError for trainings that clearly need more memory or disk than this machine has, where they are done here."""
    if not place.elsewhere:
        trials = records(store, ablation)
        more, _ = describing.samples_of(ablation, len(trials))
        fit.check(all_trainings([*trials, *more], place), place.slots)


def to_train(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """A trial of each model that is to be trained."""
    missing = {r.model: r for r in trials if r.trial.kind == "quality" and not r.complete and not r.evaluated}
    return [r for r in missing.values() if r.trial.config["trainer"]["max_steps"] and weights_of(r.trial) is None]


def trainings(missing: Sequence[TrialRecord], place: Executor) -> list[Training]:
    """Those of trials whose cost can be computed, at most MOST_SYSTEMS."""
    with reusing():
        each = [fits.training(repr(r.trial.label), r.trial.config, devices_of(place)) for r in missing[:MOST_SYSTEMS]]
        return [training for training in each if training is not None]


def all_trainings(trials: Sequence[TrialRecord], place: Executor) -> list[Training]:
    """Those of trials, and of the experiments that they take weights from."""
    missing = to_train(trials)
    with reusing():
        needed = [fits.training(name, experiments.load(name), devices_of(place)) for name in untrained(missing)]
        return [*(each for each in needed if each is not None), *trainings(missing, place)]


def devices_of(place: Executor) -> int | None:
    """Devices of a trial; None for those of this machine."""
    return max(1, place.devices or 0) if place.elsewhere else place.devices


def _line(costs: "Sequence[TrainingCost]", count: int, slots: int) -> str:
    """Trainings, parameters, FLOPs, memory at a time, disk."""
    scale = count / len(costs)
    parameters = sorted(cost.parameters / 1e6 for cost in costs)
    memory = max(cost.memory for cost in costs) * min(slots, count)
    flops = scale * sum(cost.flops * cost.devices * cost.steps for cost in costs)
    disk = scale * sum(cost.disk for cost in costs)
    about = "" if len(costs) == count else f" (by {len(costs)} of them)"
    devices = max(cost.devices for cost in costs)
    each = f", {devices} devices each" if devices > 1 else ""
    return (
        f"{count} trainings{about}: {parameters[0]:.1f} to {parameters[-1]:.1f} M parameters, "
        f"{flops / 1e15:.3g} PFLOPs, memory up to {memory / GIB:.2f} GiB with {min(slots, count)} at a time{each}, "
        f"disk {disk / GIB:.2f} GiB"
    )


def _times(costs: "Sequence[TrainingCost]", count: int, slots: int) -> list[str]:
    if any(cost.seconds is None for cost in costs):
        return [next(cost.origin for cost in costs if cost.seconds is None)]
    hours, together = count / len(costs) * sum(cost.hours for cost in costs), min(slots, count)
    return [f"training {hours:.3g} h, {hours / together:.3g} h with {together} at a time; {costs[0].origin}"]
