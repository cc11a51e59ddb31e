"""The lines of the dry run on a search: how it goes on, and random points by which its costs are estimated."""

from collections.abc import Sequence

from sana_lab.ablation.plan import Plan
from sana_lab.ablation.record import TrialRecord
from sana_lab.ablation.search import Search
from sana_lab.ablation.search.notes import best_word
from sana_lab.ablation.search.settings import pruner_of, rungs_of, search_of
from sana_lab.ablation.trials import keys_of
from sana_lab.config.schema import Range

SAMPLES = 50
"""Most random points by which the cost of proposals is estimated."""


def head(plan: Plan, trials: Sequence[TrialRecord]) -> list[str]:
    """Lines on how a search goes on; empty for another ablation."""
    search = search_of(plan.table)
    if search is None or plan.space is None:
        return []
    remaining = max(0, search.trials - len(trials))
    return [
        f"search of {search.trials} trials by {search.describe()}, for the {best_word(search)} {search.measure}",
        *(f"  {name}: {_words(choices)}" for name, choices in plan.space.choices.items()),
        *_pruning(plan, search),
        f"{len(trials)} trials so far, {remaining} to propose" + _most(search, remaining),
    ]


def samples_of(plan: Plan, done: int) -> tuple[list[TrialRecord], int]:
    """Random points in place of the trials that a search has not proposed yet, and the number of these trials."""
    search = search_of(plan.table)
    if search is None or plan.space is None:
        return [], 0
    remaining = max(0, search.trials - done)
    trials = plan.space.random(min(remaining, SAMPLES))
    return [TrialRecord(trial, *keys_of(trial, plan), None) for trial in trials], remaining


def _pruning(plan: Plan, search: Search) -> list[str]:
    if (pruner := pruner_of(search)) is None:
        return []
    metric, config = pruner.on or search.measure, plan.examples[0].config
    rungs = ", ".join(map(str, rungs_of(pruner, config, metric)))
    return [f"pruner {pruner.describe()}, by {metric} at steps {rungs} of {config['trainer']['max_steps']}"]


def _most(search: Search, remaining: int) -> str:
    return "; costs are those without pruning, of random points" if search.pruner and remaining else ""


def _words(choices: "Sequence[str] | Range") -> str:
    if not isinstance(choices, Range):
        return ", ".join(choices)
    kind = [*(["whole"] if choices.integer else []), *(["logarithmic"] if choices.log else [])]
    step = f"in steps of {choices.step}" if choices.step > 1 else ""
    words = ", ".join([*kind, *filter(None, [step])])
    return f"{choices.low:g} to {choices.high:g}" + (f" ({words})" if words else "")
