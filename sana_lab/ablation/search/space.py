"""The space of a search: labels of axes and ranges of options, and the trial of each point."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import product

import numpy as np

from sana_lab.ablation import cells, samples
from sana_lab.ablation.samples import AXIS
from sana_lab.ablation.search import Space, Values
from sana_lab.config.experiments import nest
from sana_lab.config.schema import Ablation, Config, Range, Trial
from sana_lab.config.specs import SpecError

Compose = Callable[[Mapping[str, str], Sequence[Config]], Trial]
"""The trial of labels and their overrides."""


class SearchSpace:
    """Axes and ranges of an ablation with `search:`."""

    def __init__(self, table: Ablation, compose: Compose) -> None:
        self.table, self.compose = table, compose
        self.choices: Space = {**{axis: list(changes) for axis, changes in table.axes.items()}, **table.ranges}

    def trial(self, values: Values) -> Trial:
        """The trial of a point. SpecError where it cannot be built."""
        labels = {axis: str(values[axis]) for axis in self.table.axes}
        numbers = {path: values[path] for path in self.table.ranges}
        all_labels = {**labels, AXIS: samples.label_of(numbers)} if numbers else labels
        return self.compose(all_labels, [*map(nest, cells.changes_of(self.table, labels)), nest(numbers)])

    def contains(self, values: Values) -> bool:
        """Whether a point is in the space, which its file may have changed since."""
        if values.keys() != self.choices.keys() or self.excludes(values):
            return False
        return all(_within(values[name], choices) for name, choices in self.choices.items())

    def excludes(self, values: Values) -> bool:
        """Whether `exclude:` leaves a point out."""
        return cells.is_excluded({axis: values[axis] for axis in self.table.axes}, self.table.exclude)

    @property
    def size(self) -> float:
        """Number of its points; infinite with a range of real numbers."""
        ranges = [samples.size(limits) for limits in self.table.ranges.values()]
        return math.prod([len(cells.cells(self.table)), *ranges])

    def points(self) -> Iterator[Values]:
        """Every point that is not excluded, one after the other; ValueError for an infinite space."""
        if math.isinf(self.size):
            raise ValueError("a range of real numbers has no list of its points")
        values = [samples.values(c) if isinstance(c, Range) else c for c in self.choices.values()]
        every = (dict(zip(self.choices, point, strict=True)) for point in product(*values))
        return (point for point in every if not self.excludes(point))

    @cached_property
    def corners(self) -> list[Trial]:
        """Trials that show the whole space: each label once, each range at both ends."""
        points = [self._first(), *(self._first(**{axis: label}) for axis, label in self._others())]
        points += [self._first(**{path: limits.high}) for path, limits in self.table.ranges.items()]
        return [self.trial(point) for point in points]

    def random(self, number: int, seed: int = 0) -> list[Trial]:
        """Trials of uniform points; those that cannot be built or are excluded are left out."""
        generator = np.random.default_rng(seed)
        trials = []
        for _ in range(number):
            values = {name: _point(choices, generator.random()) for name, choices in self.choices.items()}
            if not self.excludes(values):
                try:
                    trials.append(self.trial(values))
                except SpecError:
                    continue
        return trials

    def _first(self, **changes: object) -> Values:
        first: Values = dict(next(iter(cells.cells(self.table))))
        first |= {path: samples.rounded(limits, limits.low) for path, limits in self.table.ranges.items()}
        return {
            name: samples.rounded(self.table.ranges[name], value) if name in self.table.ranges else value
            for name, value in {**first, **changes}.items()
        }

    def _others(self) -> list[tuple[str, str]]:
        first = next(iter(cells.cells(self.table)))
        return [(axis, label) for axis, labels in self.table.axes.items() for label in labels if label != first[axis]]


def _within(value: object, choices: Sequence[str] | Range) -> bool:
    if not isinstance(choices, Range):
        return value in choices
    return isinstance(value, int | float) and samples.rounded(choices, value) == value


def _point(choices: Sequence[str] | Range, u: float) -> object:
    return samples.scaled(choices, u) if isinstance(choices, Range) else choices[int(u * len(choices))]
