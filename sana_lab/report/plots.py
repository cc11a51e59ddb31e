"""Plots of a table: quality with intervals, quality against cost, and training curves.

Each function writes one PNG, at most 1200 pixels wide, and returns its path. Colours are Okabe and Ito's
colour-blind-safe palette; markers differ as well.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from sana_lab.config.atomic_write import replacing
from sana_lab.report.columns import Column, column
from sana_lab.report.table import TIER, Cell, Row, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p")
WIDTH, DPI = 8.0, 150  # inches, pixels per inch


def quality(table: Table, metric: str, path: Path | str) -> Path:
    """One line for each row: the value as a point, its 95 % interval or spread over seeds as a bar."""
    rows, axis = _having(table, metric), column(metric)
    figure, axes = new_figure(1.3 + 0.42 * len(rows))
    for y, row in enumerate(rows):
        cell = row.cells[metric]
        low, high = span(cell)
        axes.hlines(y, low, high, color=_colour(0), linewidth=3, alpha=0.45)
        axes.plot(cell.mean, y, "o", color=_colour(0), markersize=8, clip_on=False)
        axes.annotate(axis.text(cell.mean), (high, y), (7, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(rows)), [wrapped(row.label, 34) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.12)
    if min(span(row.cells[metric])[0] for row in rows) >= 0:
        axes.set_xlim(left=max(0, axes.get_xlim()[0]))
    axes.set_xlabel(axis_label(axis) + _span_words(rows, metric))
    axes.set_title(headline(table.title), loc="left")
    return save(figure, path)


def tradeoff(table: Table, cost: str, metric: str, path: Path | str) -> Path:
    """Quality over cost; a line joins the Pareto-optimal rows."""
    rows = [row for row in _having(table, metric) if cost in row.cells]
    x_column, y_column = column(cost), column(metric)
    figure, axes = new_figure(4.6)
    for i, row in enumerate(rows):
        x, cell = row.cells[cost].mean, row.cells[metric]
        axes.vlines(x, *span(cell), color=_colour(i), linewidth=2, alpha=0.45)
        axes.plot(x, cell.mean, _marker(i), color=_colour(i), markersize=9, linestyle="none", label=wrapped(row.label))
    front = pareto([(row.cells[cost].mean, row.cells[metric].mean) for row in rows], x_column, y_column)
    if len(front) > 1:
        x_front, y_front = zip(*front, strict=True)
        axes.plot(x_front, y_front, color="0.6", linewidth=1.2, linestyle="--", zorder=0, label="best trade-offs")
    _scale_x(axes, [row.cells[cost].mean for row in rows])
    axes.set_xlabel(axis_label(x_column))
    axes.set_ylabel(axis_label(y_column) + _span_words(rows, metric))
    axes.set_title(headline(table.title), loc="left")
    legend(axes)
    return save(figure, path)


def curves(lines: Mapping[str, Sequence[tuple[float, float]]], path: Path | str, *, title: str) -> Path:
    """Curves of (step, training loss) by label: raw values overlaid with their running mean over 2 % of the steps."""
    figure, axes = new_figure(4.2)
    for i, (label, points) in enumerate(lines.items()):
        x, y = np.asarray(points, dtype=float).reshape(-1, 2).T
        window = max(1, round(0.02 * len(y)))
        if window > 1:
            axes.plot(x, y, color=_colour(i), linewidth=0.6, alpha=0.18)
        axes.plot(x, running_mean(y, window), color=_colour(i), linewidth=1.6, label=wrapped(label))
    axes.set_xlabel("Step")
    axes.set_ylabel("Training loss")
    axes.set_title(headline(title), loc="left")
    smooth = [y for points in lines.values() for _, y in points if math.isfinite(y)]
    if smooth:
        axes.set_ylim(*_robust_limits(smooth))
    legend(axes, least=1)  # one curve among several rows is of which?
    return save(figure, path)


def against(table: Table, axis: str, metric: str, path: Path | str) -> Path:
    """A metric over a numeric axis of the ablation (such as sampler steps), a line for each setting of the others.

    Raises ValueError if a label of `axis` is not a number.
    """
    figure, axes = new_figure(4.2)
    rows = sorted(_having(table, metric), key=lambda row: _others(row, axis))
    for i, (label, group) in enumerate(groupby(rows, partial(_others, axis=axis))):
        points = sorted((_number(row, axis), row.cells[metric]) for row in group)
        x, cells = [p[0] for p in points], [p[1] for p in points]
        low, high = zip(*map(span, cells), strict=True)
        axes.fill_between(x, low, high, color=_colour(i), alpha=0.15, linewidth=0)
        means, name = [cell.mean for cell in cells], wrapped(label or table.title)
        axes.plot(x, means, marker=_marker(i), color=_colour(i), linewidth=1.8, markersize=7, label=name)
    values = sorted({_number(row, axis) for row in rows})
    _scale_x(axes, values)
    axes.set_xticks(values)
    axes.set_xlabel(literal(axis.replace("_", " ").capitalize()))
    axes.set_ylabel(axis_label(column(metric)) + _span_words(rows, metric).replace("bars", "bands"))
    axes.set_title(headline(table.title), loc="left")
    legend(axes)
    return save(figure, path)


def span(cell: Cell) -> tuple[float, float]:
    """The ends of a cell's bar: one standard deviation on both sides, or the 95 % interval, or a point."""
    if cell.std is not None:
        return cell.mean - cell.std, cell.mean + cell.std
    return cell.interval or (cell.mean, cell.mean)


def pareto(points: Sequence[tuple[float, float]], cost: Column, gain: Column) -> list[tuple[float, float]]:
    """Pareto-optimal points from left to right; lower cost is better unless its column says otherwise."""
    x_sign = -1 if cost.better == "higher" else 1
    y_sign = -1 if gain.better == "lower" else 1
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (x_sign * p[0], -y_sign * p[1])):
        if not front or y_sign * y > y_sign * front[-1][1]:
            front.append((x, y))
    return sorted(front)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` values at each position, ignoring non-finite values."""
    finite = np.isfinite(values)
    sums = np.cumsum(np.where(finite, values, 0.0))
    counts = np.cumsum(finite)
    sums[window:], counts[window:] = sums[window:] - sums[:-window], counts[window:] - counts[:-window]
    return sums / np.where(counts == 0, np.nan, counts)


def new_figure(height: float) -> "tuple[Figure, Axes]":
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    axes = figure.subplots()
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Figure, path: Path | str) -> Path:
    """Write the PNG, whose path is returned, and a PDF beside it."""
    with replacing(Path(path)) as partial:
        figure.savefig(partial, format="png", facecolor="white")
    with replacing(Path(path).with_suffix(".pdf")) as partial:
        figure.savefig(partial, format="pdf", metadata={"CreationDate": None})
    return Path(path)


def literal(text: str) -> str:
    """Text that matplotlib draws as it is: a dollar begins no formula, a first underscore hides nothing in a legend."""
    escaped = text.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def legend(axes: "Axes", least: int = 2) -> None:
    """Names beside the axes, if there are so many or more."""
    if len(axes.get_legend_handles_labels()[0]) >= least:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, labelspacing=0.8)


def _scale_x(axes: "Axes", values: Sequence[float]) -> None:
    """Use a logarithmic axis with plain numbers if the values span a factor of eight."""
    if min(values) <= 0 or max(values) <= 8 * min(values):
        return
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _having(table: Table, metric: str) -> list[Row]:
    rows = [row for row in table.rows if metric in row.cells]
    if not rows:
        raise ValueError(
            f"no row of {table.title!r} has the metric {metric!r}; it has {[c.name for c in table.columns]}"
        )
    return rows


def _others(row: Row, axis: str) -> str:
    """The labels on other axes; the tier follows from these."""
    return ", ".join(label for name, label in row.labels.items() if name not in (axis, TIER))


def _number(row: Row, axis: str) -> float:
    try:
        return float(row.labels[axis])
    except (KeyError, ValueError):
        raise ValueError(f"axis {axis!r} of row {row.label!r} is not a number: {row.labels}") from None


def axis_label(column: Column) -> str:
    unit = f" ({column.unit})" if column.unit else ""
    return literal(column.heading + unit) + (f", {column.better} is better" if column.better else "")


def _span_words(rows: Sequence[Row], metric: str) -> str:
    cells = [row.cells[metric] for row in rows]
    if any(cell.std is not None for cell in cells):
        return "\nbars: standard deviation over seeds"
    return "\nbars: 95 % interval" if any(cell.interval for cell in cells) else ""


def _robust_limits(values: Sequence[float]) -> tuple[float, float]:
    """Axis limits that ignore a few high values at the start."""
    low, high = np.min(values), np.quantile(values, 0.99)
    return float(low - 0.05 * (high - low)), float(high + 0.1 * (high - low) + 1e-12)


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _marker(i: int) -> str:
    return MARKERS[i % len(MARKERS)]


def headline(title: str) -> str:
    """A title in lines that fit beside the labels of rows."""
    return wrapped(title, 64)


def wrapped(label: str, width: int = 26) -> str:
    return literal(textwrap.fill(label, width))
