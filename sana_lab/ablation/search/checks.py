"""Checks of `search:` and `ranges:` of an ablation, before any work."""

from collections.abc import Collection
from dataclasses import fields

from sana_lab.ablation import samples
from sana_lab.ablation.checks import OF_TRAINING
from sana_lab.ablation.samples import AXIS
from sana_lab.ablation.search import Search
from sana_lab.ablation.search.measured import metrics_of
from sana_lab.ablation.search.settings import (
    direction,
    pruner_of,
    pruning_direction,
    pruning_metric,
    rungs_of,
    watched,
)
from sana_lab.ablation.search.space import SearchSpace
from sana_lab.config import hashing
from sana_lab.config.schema import Ablation
from sana_lab.config.specs import SpecError, nearest
from sana_lab.report.columns import is_cost

WITHOUT = {
    "samples": "axes and ranges alone",
    "match": "rows that are trained as they are",
    "weights": "rows that are trained",
    "baseline": "no baseline, as its rows are not known",
    "x": "no x, as its rows are not known",
    "expect": "no claims, as its rows are not known",
}
"""Options that a search has not, and what is expected instead."""


def check_options(table: Ablation, title: str) -> None:
    """SpecError for ranges without a search, a search of nothing, and options that do not go with one."""
    if table.search is None:
        if table.ranges:
            raise SpecError(
                f"{title} has ranges and no search; expected search: {{name: optuna, trials: 40}}, or samples: "
                "{number: 40, ranges: ...} for points that are chosen beforehand"
            )
        return
    if not table.axes and not table.ranges:
        raise SpecError(
            f"{title} searches nothing, expected such as ranges: {{system.optimizer.lr: {{low: 1.0e-4, high: 1.0e-2, "
            "log: true}}"
        )
    defaults = {each.name: each.default for each in fields(Ablation)}
    for name, words in WITHOUT.items():
        if getattr(table, name) not in (defaults[name], []):
            raise SpecError(f"{title} has a search and {name}; expected {words}")
    if table.combine != "product":
        raise SpecError(f"{title} has a search and combine: {table.combine}; expected combine: product")
    if len(table.seeds) != 1:
        raise SpecError(
            f"{title} has a search and seeds {table.seeds}, expected one; train the best again with others: axes with "
            "its values, and seeds"
        )
    for path, limits in table.ranges.items():
        samples.check(limits, f"{title}: ranges.{path}")
    if twice := next((axis for axis in table.axes if axis in (AXIS, *table.ranges)), None):
        raise SpecError(f"{title} has an axis {twice!r} beside ranges, which have that name; expected another")


def check_space(search: Search, space: SearchSpace, title: str) -> None:
    """SpecError for more trials than points, and for a range that changes nothing."""
    if search.trials > space.size:
        raise SpecError(
            f"{title} has search.trials {search.trials} of {space.size:.0f} points, expected at most as many"
        )
    first, *_ = space.corners
    names = list(space.table.ranges)
    for path, trial in zip(reversed(names), reversed(space.corners), strict=False):
        if hashing.trial_hash(trial) == hashing.trial_hash(first):
            raise SpecError(
                f"{title} searches {path}, which changes no result: {samples.label_of({path: 0}).split()[0]} is "
                "overridden, not used, or changes only how trials run; expected another option"
            )


def check_measure(search: Search, space: SearchSpace, known: Collection[str] | None, title: str) -> None:
    """SpecError for a measure that no trial has when the next is proposed, or without a better direction; None is that
    any may be known."""
    pruner = pruner_of(search)
    for name, option in ((search.measure, "search.measure"), (pruner and pruner.on, "search.pruner.on")):
        if name and known is not None:
            if name not in known:
                raise SpecError(f"{title} has {option} {name!r}, which is no metric; {nearest(name, known)}")
            _check_measured(name, space, f"{title} has {option} {name!r}")
    if direction(search) is None:
        raise SpecError(
            f"{title} has search.measure {search.measure!r}, of which neither more nor less is known to be better; "
            "expected search.direction lower or higher"
        )
    if pruning_direction(search) is None:
        raise SpecError(
            f"{title} has search.pruner.on {pruning_metric(search)!r}, of which neither more nor less is known to be "
            "better; expected the measure of the search, with search.direction, or such as val_loss"
        )


def _check_measured(name: str, space: SearchSpace, words: str) -> None:
    if is_cost(name) and name not in OF_TRAINING:
        raise SpecError(
            f"{words}, a cost, which trials have only after the search; expected a metric of training or evaluation, "
            "such as val_loss"
        )
    for trial in space.corners:
        if name not in (measured := metrics_of(trial.config)):
            raise SpecError(
                f"{words}, which {trial.label!r} does not measure; {nearest(name, measured)}, or eval.measures or "
                "eval.fid_weights that measure it"
            )


def check_pruner(search: Search, space: SearchSpace, title: str) -> None:
    """SpecError for a pruner that no trial would reach a rung of."""
    if (pruner := pruner_of(search)) is None:
        return
    metric = pruner.on or search.measure
    for trial in space.corners:
        trainer = trial.config["trainer"]
        if trainer["max_seconds"] is not None:
            raise SpecError(
                f"{title} has a pruner, which compares trainings at equal steps, and {trial.label!r} trains for "
                f"{trainer['max_seconds']:g} s; expected trainer.max_steps, or pruner: null"
            )
        steps = watched(trial.config, metric)
        if not [step for step in steps if step < trainer["max_steps"]]:
            raise SpecError(
                f"{title} has a pruner on {metric}, which {trial.label!r} has {_never(trial.config, metric)}"
            )
        if not rungs_of(pruner, trial.config, metric):
            raise SpecError(
                f"{title} has no rung below trainer.max_steps {trainer['max_steps']} of {trial.label!r}; expected "
                f"pruner.first at most {max(step for step in steps if step < trainer['max_steps'])}"
            )


def _never(config: dict, metric: str) -> str:
    every, steps = config["trainer"]["validate_every"], config["trainer"]["max_steps"]
    if metric == "val_loss":
        return (
            f"only at its end: trainer.validate_every is {every}, and trainer.max_steps {steps}; expected "
            f"trainer.validate_every {max(1, steps // 9)}, or pruner: null"
        )
    return (
        "only at its end; expected points on the way, such as common: {eval.every: "
        f"{max(1, steps // 4)}}}, or pruner: {{name: asha, on: val_loss}}"
    )
