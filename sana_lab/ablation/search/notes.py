"""Notes under the table of a search: its best trial, and those that were pruned."""

import json
import math
from collections.abc import Iterator, Sequence

from sana_lab.ablation.record import PRUNED, TrialRecord
from sana_lab.ablation.search import Search
from sana_lab.ablation.search.settings import direction, pruner_of, search_of
from sana_lab.config.schema import Ablation
from sana_lab.report.columns import column


def table_notes(ablation: Ablation, trials: Sequence[TrialRecord]) -> list[str]:
    """Lines under the table of a search: its best trial, and those that were pruned, which have no row."""
    if (search := search_of(ablation)) is None:
        return []
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
        f"{place + 1}, {trials[place].trial.label!r}, is the {best_word(search)} of {len(values)} that finished."
    )


def _has(record: TrialRecord, search: Search) -> bool:
    """Whether a trial has finished with a value, as the search sees it."""
    return record.run is not None and record.done and math.isfinite(record.run.metrics.get(search.measure, math.nan))


def _pruned_line(search: Search, trials: Sequence[TrialRecord]) -> Iterator[str]:
    ends = [json.loads(r.run.tags[PRUNED]) for r in trials if r.pruned and r.run is not None]
    pruner = pruner_of(search)
    if not ends or pruner is None:  # without a pruner no trial counts as pruned
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


def best_word(search: Search) -> str:
    """Which of its values a search looks for."""
    return "lowest" if direction(search) == "lower" else "highest"
