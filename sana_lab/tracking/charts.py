"""Cards of MLflow's chart view for a sweep: quality first, then its cost, curves, coordinates and pictures.

MLflow does not document their format; `tests/tracking/test_browser.py` reads the page that it makes of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sana_lab.report.columns import Column, column

Card = dict[str, Any]

SECTION = "sana-lab"
"""Key of the section with the pinned cards."""

HEIGHT = 380
"""Pixels of a card."""

CURVES = ("points/", "train/loss", "val/loss", "val/psnr")
"""Curves to show: quality at points of the training first, then losses; of names that end with / the quality's."""


class Content(NamedTuple):
    """What the trials of a sweep have."""

    axes: Sequence[str]  # parameters with the labels
    quality: str | None
    cost: str | None
    metrics: Sequence[str]  # columns of the table, in order
    curves: Sequence[str]  # metrics with several steps
    images: Mapping[str, int]  # key of logged images -> step to show


def section(columns: int = 2) -> Card:
    """The section, two cards a row."""
    return {
        "uuid": SECTION, "name": "The sweep", "display": True, "isReordered": True, "columns": columns,
        "cardHeight": HEIGHT,
    }  # fmt: skip


def cards(content: Content) -> list[Card]:
    """Up to eight cards, quality first: over the rows, over each axis with its spread, over cost, over steps, loss, all
    axes and measures, and the images."""
    quality, cost = content.quality, content.cost
    shown = [*bars(quality), *(spread(axis, quality) for axis in content.axes[:2] if quality)]
    shown += [tradeoff(cost, quality)] if quality and cost else []
    shown += [line(name) for name in curves_of(content)]
    shown += coordinates(content)
    shown += [image(key, step) for key, step in content.images.items()]
    return [{**common(i), **card} for i, card in enumerate(shown[:8])]


def common(i: int) -> Card:
    """Entries of every card."""
    flags = {"deleted": False, "isGenerated": False}
    return {"uuid": f"{SECTION}-{i}", "metricSectionId": SECTION, "runsCountToCompare": 100, **flags}


def bars(quality: str | None) -> list[Card]:
    """The quality of each trial, or the mean of each group where the page groups."""
    if quality is None:
        return []
    return [{"type": "BAR", "metricKey": quality, "displayName": title(quality)}]


def spread(axis: str, quality: str) -> Card:
    """Quality by the labels of an axis: a point for each trial, so that the spread over seeds shows."""
    name = f"{title(quality)} by {axis.partition('.')[2] or axis}"
    return {
        "type": "SCATTER", "xaxis": {"key": axis, "type": "PARAM"}, "yaxis": {"key": quality, "type": "METRIC"},
        "displayName": name,
    }  # fmt: skip


def tradeoff(cost: str, quality: str) -> Card:
    """Quality over cost."""
    return {
        "type": "SCATTER", "xaxis": {"key": cost, "type": "METRIC"}, "yaxis": {"key": quality, "type": "METRIC"},
        "displayName": f"{title(quality)} over {title(cost)}",
    }  # fmt: skip


def curves_of(content: Content) -> list[str]:
    """Quality over steps if it has points, and one loss."""
    points = [name for name in content.curves if name == f"points/{content.quality}"]
    losses = [name for name in CURVES[1:] if name in content.curves]
    return [*points, *losses][:2]


def line(metric: str) -> Card:
    """A metric over steps."""
    options = {"lineSmoothness": 0, "scaleType": "linear", "xAxisKey": "step", "xAxisScaleType": "linear"}
    card = {"type": "LINE", "metricKey": metric, "selectedMetricKeys": [metric], "yAxisKey": "metric"}
    return {**card, **options, "useGlobalXaxisKey": False, "displayName": f"{metric} over steps"}


def coordinates(content: Content) -> list[Card]:
    """Parallel coordinates of the axes, the quality and the cost; none for a single number."""
    metrics = [name for name in (content.cost, content.quality) if name]
    if len(content.axes) + len(metrics) < 2:
        return []
    axes = {"selectedParams": list(content.axes), "selectedMetrics": metrics, "showAllRuns": True}
    return [{"type": "PARALLEL", **axes, "displayName": "Axes and measures"}]


def image(key: str, step: int) -> Card:
    """Logged images of each trial, their prompts in the images."""
    return {"type": "IMAGE", "imageKeys": [key], "displayName": key, "step": step, "showRunParams": False}


def title(metric: str) -> str:
    """Heading, unit and better direction of a metric."""
    head: Column = column(metric)
    return head.title
