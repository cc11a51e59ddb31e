"""Plots of efficiency tables: bars of cumulative changes, and two costs over sizes with their crossover."""

import textwrap
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from sana_lab.report.columns import column
from sana_lab.report.crossover import SCOPES, Crossing, crossing_of, tokens_of
from sana_lab.report.plots import COLOURS, DPI, MARKERS, WIDTH, literal, save, span
from sana_lab.report.table import Published, Row, Table


def walk(table: Table, metric: str, path: Path | str) -> Path:
    """A bar per row on a logarithmic axis, annotated with its gain over the previous row; published numbers are hollow
    bars."""
    rows = [row for row in table.rows if metric in row.cells]
    axis = column(metric)
    theirs = _published(table.published, metric)
    figure = Figure(figsize=(WIDTH, 1.6 + 0.62 * len(rows)), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.12))
    axes: Axes = figure.subplots()
    aside = 0.19 if theirs else 0.0
    for y, row in enumerate(rows):
        cell = row.cells[metric]
        label = axis.text(cell.mean) + (f"  ({rows[y - 1].cells[metric].mean / cell.mean:.3g}x)" if y else "")
        _bar(axes, y - aside, cell.mean, label, {"color": COLOURS[0]})
        low, high = span(cell)
        axes.hlines(y - aside, low, high, color="black", linewidth=1.2)
        if row.label in theirs:
            style = {"facecolor": "none", "edgecolor": COLOURS[1], "linewidth": 1.3}
            _bar(axes, y + aside, theirs[row.label], f"{theirs[row.label]:g}, published", style)
    axes.set_yticks(range(len(rows)), [literal(textwrap.fill(row.label, 26)) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.set_xlim(right=axes.get_xlim()[1] * 6)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel(f"{literal(axis.heading)} ({axis.unit}), logarithmic; in brackets: times less than the row before")
    axes.set_title(literal(textwrap.fill(table.title, 84)), loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    return save(figure, path)


def crossings(table: Table, names: tuple[str, str], path: Path | str) -> Path:
    """Two costs over the number of tokens, one panel per timed scope, with marked crossovers."""
    scopes = [s for s in SCOPES if any(f"{names[0]}_{s}_ms" in row.cells for row in table.rows)]
    lines = -(-len(scopes) // 2)
    figure = Figure(figsize=(WIDTH, 0.7 + 2.9 * lines), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    for axes, scope in zip(figure.subplots(lines, 2, squeeze=False).flat, scopes, strict=False):
        _panel(axes, table.rows, names, scope)
    for axes in figure.axes[len(scopes) :]:
        axes.remove()
    figure.suptitle(literal(textwrap.fill(table.title, 90)), x=0.01, ha="left", fontsize=10)
    return save(figure, path)


def _panel(axes: Axes, rows: list[Row], names: tuple[str, str], scope: str) -> None:
    for i, name in enumerate(names):
        points = [(tokens_of(r), r.cells[f"{name}_{scope}_ms"]) for r in rows if f"{name}_{scope}_ms" in r.cells]
        x = [n for n, _ in points]
        low, high = zip(*(span(cell) for _, cell in points), strict=True)
        axes.fill_between(x, low, high, color=COLOURS[i], alpha=0.2, linewidth=0)
        axes.plot(
            x, [cell.mean for _, cell in points], MARKERS[i], linestyle="-", color=COLOURS[i], label=literal(name)
        )
    _mark(axes, crossing_of(rows, scope))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted({tokens_of(r) for r in rows})))
    axes.xaxis.set_minor_locator(NullLocator())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_title(SCOPES[scope], fontsize=9, loc="left")
    axes.set_xlabel("tokens", fontsize=8)
    axes.set_ylabel("ms", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def _mark(axes: Axes, crossing: Crossing | None) -> None:
    if crossing is None or crossing.at is None:
        words = "no crossover: not enough ratios" if crossing is None else "no crossover in range"
        axes.text(0.98, 0.04, words, transform=axes.transAxes, ha="right", fontsize=8, color="0.35")
        return
    axes.axvline(crossing.at, color="0.3", linestyle="--", linewidth=1.1)
    axes.axvspan(crossing.low or crossing.first, crossing.high or crossing.last, color="0.5", alpha=0.15, linewidth=0)
    axes.text(0.98, 0.04, f"crossover at {crossing.at:.0f}", transform=axes.transAxes, ha="right", fontsize=8)


def _bar(axes: Axes, y: float, value: float, label: str, style: dict[str, object]) -> None:
    axes.barh(y, value, height=0.34, **style)  # type: ignore[arg-type]
    axes.annotate(label, (value, y), (5, 0), textcoords="offset points", va="center", fontsize=8)


def _published(published: Published | None, metric: str) -> dict[str, float]:
    if published is None:
        return {}
    name = column(metric).published or metric
    return {row.label: row.cells[name].mean for row in published.rows if name in row.cells}
