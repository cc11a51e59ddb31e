"""Words on a search: the lines of the dry run, and the notes of its table."""

import json
from collections.abc import Iterator, Sequence

from sana_lab.ablation.plan import Plan
from sana_lab.ablation.record import PRUNED, TrialRecord
from sana_lab.ablation.search import Search
from sana_lab.ablation.search.judging import direction, pruner_of, rungs_of
from sana_lab.ablation.search.proposals import search_of
from sana_lab.ablation.trials import keys_of
from sana_lab.config import specs
from sana_lab.config.schema import Ablation, Range
from sana_lab.report.columns import column

SAMPLES = 50
"""Most random points by which the cost of proposals is estimated."""


def head(plan: Plan, trials: Sequence[TrialRecord]) -> list[str]:
    """Lines on how a search goes on; empty for another ablation."""
    search = search_of(plan)
    if search is None or plan.space is None:
        return []
    remaining = max(0, search.trials - len(trials))
    return [
        f"search of {search.trials} trials by {search.describe()}, for the {_best(search)} {search.measure}",
        *(f"  {name}: {_words(choices)}" for name, choices in plan.space.choices.items()),
        *_pruning(plan, search),
        f"{len(trials)} trials so far, {remaining} to propose" + _most(search, remaining),
    ]


def samples_of(plan: Plan, done: int) -> tuple[list[TrialRecord], int]:
    """Random points in place of the trials that a search has not proposed yet, and the number of these trials."""
    search = search_of(plan)
    if search is None or plan.space is None:
        return [], 0
    remaining = max(0, search.trials - done)
    trials = plan.space.random(min(remaining, SAMPLES))
    return [TrialRecord(trial, *keys_of(trial, plan), None) for trial in trials], remaining


def notes(ablation: Ablation, trials: Sequence[TrialRecord]) -> list[str]:
    """Lines under the table of a search: its best trial, and those that were pruned, which have no row."""
    if ablation.search is None:
        return []
    search: Search = specs.build("search", ablation.search)
    return [*_best_line(search, trials), *_pruned_line(search, trials)]


def _best_line(search: Search, trials: Sequence[TrialRecord]) -> Iterator[str]:
    sign = 1 if direction(search) == "lower" else -1
    values = [(r.run.metrics[search.measure], i) for i, r in enumerate(trials) if _has(r, search) and r.run is not None]
    if not values:
        return
    value, place = min(values, key=lambda pair: (sign * pair[0], pair[1]))
    shown = column(search.measure)
    yield (
        f"Search of {search.trials} trials by {search.describe()}: {shown.heading} {shown.text(value)} of trial "
        f"{place + 1}, {trials[place].trial.label!r}, is the {_best(search)} of {len(values)} that finished."
    )


def _has(record: TrialRecord, search: Search) -> bool:
    return record.run is not None and record.done and search.measure in record.run.metrics


def _pruned_line(search: Search, trials: Sequence[TrialRecord]) -> Iterator[str]:
    ends = [json.loads(r.run.tags[PRUNED]) for r in trials if r.pruned and r.run is not None]
    if not ends or (pruner := pruner_of(search)) is None:
        return
    steps = sorted({end["step"] for end in ends})
    listed = "; ".join(f"{len(at)} at step {step} ({_range(at)})" for step in steps if (at := _at(ends, step)))
    yield f"{len(ends)} of {len(trials)} trials were pruned and have no row ({pruner.describe()}): {listed}."


def _at(ends: Sequence[dict], step: int) -> list[dict]:
    return [end for end in ends if end["step"] == step]


def _range(ends: Sequence[dict]) -> str:
    values = [end["value"] for end in ends]
    text = f"{min(values):.4g}" if len(ends) == 1 else f"{min(values):.4g} to {max(values):.4g}"
    return f"{ends[0]['metric']} {text}"


def _pruning(plan: Plan, search: Search) -> list[str]:
    if (pruner := pruner_of(search)) is None:
        return []
    metric, config = pruner.on or search.measure, plan.examples[0].config
    rungs = ", ".join(map(str, rungs_of(pruner, config, metric)))
    return [f"pruner {pruner.describe()}, by {metric} at steps {rungs} of {config['trainer']['max_steps']}"]


def _best(search: Search) -> str:
    return "lowest" if direction(search) == "lower" else "highest"


def _most(search: Search, remaining: int) -> str:
    return "; costs are those without pruning, of random points" if search.pruner and remaining else ""


def _words(choices: "Sequence[str] | Range") -> str:
    if not isinstance(choices, Range):
        return ", ".join(choices)
    kind = [*(["whole"] if choices.integer else []), *(["logarithmic"] if choices.log else [])]
    step = f"in steps of {choices.step}" if choices.step > 1 else ""
    words = ", ".join([*kind, *filter(None, [step])])
    return f"{choices.low:g} to {choices.high:g}" + (f" ({words})" if words else "")
