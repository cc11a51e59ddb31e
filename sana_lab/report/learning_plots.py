"""Plots of quality over a training: a line for each row, with its spread over seeds."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sana_lab.report import plots
from sana_lab.report.columns import column
from sana_lab.report.learning import AXES, Axis, Curve, Float, common, positions

TITLES: dict[Axis, str] = {
    "steps": "Training steps",
    "images": "Training images",
    "seconds": "Seconds of training steps",
}


def learning(
    rows: Mapping[str, Sequence[Curve]], metric: str, axis: Axis, path: Path | str, *, title: str, baseline: str
) -> Path:
    """A metric over an axis: means over seeds with a band of one standard deviation, or of one seed with its 95 %
    interval; a dotted line at the end of the baseline."""
    figure, axes = plots.new_figure(4.6)
    for i, (label, curves) in enumerate(rows.items()):
        points = common(curves)
        if not points or not points[0]:
            continue
        values = np.array([[v.value for v in curve] for curve in points])
        x, mean = positions(points, axis).mean(0), values.mean(0)
        colour, marker = plots.COLOURS[i % len(plots.COLOURS)], plots.MARKERS[i % len(plots.MARKERS)]
        axes.plot(x, mean, marker=marker, color=colour, linewidth=1.8, label=plots.wrapped(label))
        low, high = _band(points, values)
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        if label == baseline:
            axes.axhline(float(mean[-1]), color="0.5", linestyle=":", linewidth=1.2)
    axes.set_xlim(left=0)
    axes.set_xlabel(TITLES[axis])
    axes.set_ylabel(plots.axis_label(column(metric)) + _words(rows))
    axes.set_title(plots.headline(title), loc="left")
    plots.legend(axes)
    return plots.save(figure, path)


def write(rows: Mapping[str, Sequence[Curve]], metric: str, folder: Path, *, title: str, baseline: str) -> list[Path]:
    """`METRIC_by_{steps,images,seconds}.png`."""
    paths = {axis: folder / f"{metric}_by_{axis}.png" for axis in AXES}
    return [learning(rows, metric, axis, path, title=title, baseline=baseline) for axis, path in paths.items()]


def _band(points: Sequence[Curve], values: Float) -> tuple[Float, Float]:
    """The ends (P,) of the band: over seeds, or of one seed over prompts."""
    if len(values) > 1:
        return values.mean(0) - values.std(0, ddof=1), values.mean(0) + values.std(0, ddof=1)
    ends = np.array([v.interval or (v.value, v.value) for v in points[0]])
    return ends[:, 0], ends[:, 1]


def _words(rows: Mapping[str, Sequence[Curve]]) -> str:
    several = any(len(curves) > 1 for curves in rows.values())
    return "\nbands: standard deviation over seeds" if several else "\nbands: 95 % interval"
