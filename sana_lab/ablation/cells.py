"""The cells of an ablation: labels of its axes, by product, zip or one axis at a time, without excluded ones."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product

from sana_lab.config.schema import Ablation, Config, EfficiencyTable
from sana_lab.config.specs import SpecError, nearest

Axes = Mapping[str, Mapping[str, Config | None]]


def cells(table: Ablation | EfficiencyTable) -> list[dict[str, str]]:
    """Each cell as axis -> label, in the order of the rows."""
    return [cell for cell in _combined(table.axes, table.combine) if not is_excluded(cell, table.exclude)]


def count(table: Ablation | EfficiencyTable) -> int:
    """Number of cells before any is excluded, which may be too many to list."""
    sizes = [len(changes) for changes in table.axes.values()]
    return {"product": math.prod(sizes), "zip": max(sizes), "list": 1 + sum(sizes) - len(sizes)}[table.combine]


def changes_of(table: Ablation | EfficiencyTable, cell: Mapping[str, str]) -> list[Config]:
    """The overrides of a cell's labels."""
    return [table.axes[axis][label] or {} for axis, label in cell.items()]


def check(table: Ablation | EfficiencyTable, title: str) -> None:
    """SpecError for axes that cannot be zipped, and for exclusions that name no cell or leave none."""
    sizes = {axis: len(changes) for axis, changes in table.axes.items()}
    if table.combine == "zip" and len(set(sizes.values())) > 1:
        listed = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise SpecError(f"{title} zips axes of different lengths ({listed}), expected as many labels in each")
    for exclusion in table.exclude:
        _check_exclusion(exclusion, table.axes, title)
        if not any(is_excluded(cell, [exclusion]) for cell in _combined(table.axes, table.combine)):
            raise SpecError(f"{title} excludes {exclusion}, which is no combination of its labels")
    if not cells(table):
        raise SpecError(f"{title} excludes all of its rows, expected at least one")


def _combined(axes: Axes, combine: str) -> Iterator[dict[str, str]]:
    if combine == "zip":
        yield from (dict(zip(axes, labels, strict=True)) for labels in zip(*axes.values(), strict=False))
        return
    if combine == "product":
        yield from (dict(zip(axes, labels, strict=True)) for labels in product(*axes.values()))
        return
    first = {axis: next(iter(changes)) for axis, changes in axes.items()}
    yield first
    yield from ({**first, axis: label} for axis, changes in axes.items() for label in list(changes)[1:])


def is_excluded(cell: Mapping[str, str], exclusions: Sequence[Mapping[str, str | list[str]]]) -> bool:
    """Whether one of the exclusions names these labels."""
    return any(all(cell[axis] in _labels(labels) for axis, labels in each.items()) for each in exclusions)


def _labels(labels: str | list[str]) -> list[str]:
    return [str(label) for label in labels] if isinstance(labels, list) else [str(labels)]


def _check_exclusion(exclusion: Mapping[str, str | list[str]], axes: Axes, title: str) -> None:
    if not exclusion:
        raise SpecError(f"{title} has an empty exclusion, expected labels of axes, such as {{attention: linear}}")
    for axis, labels in exclusion.items():
        if axis not in axes:
            raise SpecError(f"{title} excludes labels of {axis!r}, which is no axis; {nearest(axis, axes)}")
        for label in _labels(labels):
            if label not in axes[axis]:
                raise SpecError(f"{title} excludes {label!r} of {axis!r}; {nearest(label, axes[axis])}")
