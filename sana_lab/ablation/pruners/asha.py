"""Pruner `asha`: asynchronous successive halving (Li et al., arXiv 1810.05934), as a rule that stops trainings.

The paper pauses a training at each rung until it is among the best; here it goes on at once if it is among the best of
those that have come so far, and ends otherwise, so that no worker waits and no training is taken up again.
"""

import math
from collections.abc import Sequence
from typing import Annotated

from annotated_types import Ge, Le

from sana_lab.ablation.pruners import Pruner
from sana_lab.config.ranges import Interval


class Asha(Pruner):
    """At each rung the best 1 of `reduction` goes on, of those that have reached it; the best one always does."""

    def __init__(
        self,
        reduction: Annotated[int, Ge(2), Le(100)] = 3,  # of the number of trainings, and growth of the rungs' steps
        first: Interval | None = None,  # optimiser steps of the first rung; null is the first validation, or point
        on: str | None = None,  # metric that is compared, such as val_loss; null is the measure of the search
    ) -> None:
        self.reduction, self.first, self.on = reduction, first, on

    def rungs(self, first: int, last: int) -> list[int]:
        steps = []
        step = max(first, self.first or first)
        while step < last:
            steps.append(step)
            step *= self.reduction
        return steps

    def stops(self, value: float, others: Sequence[float]) -> bool:
        if math.isnan(value):
            return True
        values = sorted([value, *(other for other in others if not math.isnan(other))])
        kept = max(1, len(values) // self.reduction)
        return value > values[kept - 1]

    def describe(self) -> str:
        return f"asha, the best 1 of {self.reduction} of each rung goes on"
