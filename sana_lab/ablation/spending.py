"""What an ablation will cost, for its dry run: the trainings that are missing, their memory, disk and hours."""

from collections.abc import Sequence

from sana_lab.ablation.record import TrialRecord
from sana_lab.ablation.trials import weights_of
from sana_lab.bench.training_cost import TrainingCost, check_fits, training_cost
from sana_lab.config.memo import reusing
from sana_lab.config.specs import SpecError
from sana_lab.costs.too_large import GIB

MOST_SYSTEMS = 50
"""Most different trainings whose cost is computed; each takes some tens of milliseconds or more."""


def estimate(trials: Sequence[TrialRecord], slots: int, more: int = 0) -> list[str]:
    """Lines on the trainings to do with `slots` at a time, and on one that this machine's memory is too small for;
    empty if there are none. `more` trainings cost as much as the mean of these."""
    missing = {r.model: r for r in trials if r.trial.kind == "quality" and not r.complete and not r.evaluated}
    to_train = [r for r in missing.values() if _counts(r) and weights_of(r.trial) is None]
    with reusing():
        costs = [(r.trial.label, cost) for r in to_train[:MOST_SYSTEMS] if (cost := _cost(r)) is not None]
    if not costs:
        return []
    known, count = [cost for _, cost in costs], len(to_train) + more
    return [_line(known, count, slots), *_times(known, count, slots), *_unfit(costs)]


def _counts(record: TrialRecord) -> bool:
    """Whether a trial trains for a number of steps: not for none, nor for a time."""
    trainer = record.trial.config["trainer"]
    return bool(trainer["max_steps"]) and trainer["max_seconds"] is None


def _cost(record: TrialRecord) -> TrainingCost | None:
    try:
        return training_cost(record.trial.config)
    except (SpecError, NotImplementedError, RuntimeError):  # RuntimeError of a part of the user's own
        return None


def _unfit(costs: Sequence[tuple[str, TrainingCost]]) -> list[str]:
    """What the largest training lacks here, if its memory is not enough."""
    label, largest = max(costs, key=lambda item: item[1].memory)
    try:
        check_fits(largest, repr(label))
    except SpecError as error:
        return [f"does not fit this machine: {error}"]
    return []


def _line(costs: Sequence[TrainingCost], count: int, slots: int) -> str:
    """Trainings, parameters, FLOPs, memory at a time, disk."""
    scale = count / len(costs)
    parameters = sorted(cost.parameters / 1e6 for cost in costs)
    memory = max(cost.memory for cost in costs) * min(slots, count)
    flops = scale * sum(cost.flops * cost.steps for cost in costs)
    disk = scale * sum(cost.disk for cost in costs)
    about = "" if len(costs) == count else f" (by {len(costs)} of them)"
    return (
        f"{count} trainings{about}: {parameters[0]:.1f} to {parameters[-1]:.1f} M parameters, "
        f"{flops / 1e15:.3g} PFLOPs, memory up to {memory / GIB:.2f} GiB with {min(slots, count)} at a time, "
        f"disk {disk / GIB:.2f} GiB"
    )


def _times(costs: Sequence[TrainingCost], count: int, slots: int) -> list[str]:
    if any(cost.seconds is None for cost in costs):
        return [next(cost.origin for cost in costs if cost.seconds is None)]
    hours, together = count / len(costs) * sum(cost.hours for cost in costs), min(slots, count)
    return [f"training {hours:.3g} h, {hours / together:.3g} h with {together} at a time; {costs[0].origin}"]
