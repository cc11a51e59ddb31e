"""Shared views of MLflow's runs page: the trials of a sweep, the best first, and its rows as means over seeds."""

import base64
import json
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from sana_lab.report.columns import COLUMNS, ENDS, column, cost_of, quality_of
from sana_lab.tracking import charts
from sana_lab.tracking.charts import Content
from sana_lab.tracking.store import Run, Store, clean

VIEW, ROWS = "sana-lab", "sana-lab-rows"
"""Keys of the views among an experiment's tags, and in links: each trial, and means of rows over seeds."""

STATE, CURRENT = "sana.state", "current"
"""Tag of trials that belong to the ablation as it is now; others are hidden."""

TABLE_COLUMNS, TABLE_AXES = "sana.columns", "sana.axes"
"""Tags of a sweep's run: names of its table's columns, and of its axes, in their order, as JSON."""

KIND = "mlflow.experimentKind"
"""MLflow's tag of an experiment that says which of its pages open: those for training, not those for agents."""

MAX_PARAMS = 6
"""Columns of parameters where there are no axes."""

WIDTHS = {"param": 100, "quality": 85, "metric": 85, "seed": 60}
"""Pixels of columns: with two axes, all down to the cost are on a page of 1,280."""


def write_view(store: Store, experiment: str) -> None:
    """Save the views that the links open: flat (a child of a sweep is a row like any other), the best first.

    MLflow keeps shared views as tags of the experiment, in an undocumented format; a version that reads another format
    shows its own default view.
    """
    runs = store.all_runs(experiment)
    mark_current(store, runs)
    images = image_steps(store, trials(runs))
    views = {VIEW: ("sana-lab: every trial", view(runs, images)), ROWS: ("sana-lab: means of rows", rows_view(runs))}
    now = int(time.time() * 1000)
    for key, (name, content) in views.items():
        state = "deflate;" + base64.b64encode(zlib.compress(json.dumps(content).encode())).decode()
        shared = {"name": name, "createdAt": now, "updatedAt": now, "state": state}
        store.client.set_experiment_tag(experiment, f"mlflow.sharedViewState.{key}", json.dumps(shared))
    store.client.set_experiment_tag(experiment, KIND, "custom_model_development")


def mark_current(store: Store, runs: Sequence[Run]) -> None:
    """Tag trials that an earlier version of the lab recorded, so that the view's filter shows them."""
    for run in runs:
        if run.parent and STATE not in run.tags:
            store.set_tags(run.id, {STATE: CURRENT})


def view(runs: Sequence[Run], images: Mapping[str, int] | None = None) -> dict[str, Any]:
    """The state of MLflow's runs page: columns, an order (any but by date shows children as rows), filter, charts.

    `images` maps the keys of logged images to the step to show. MLflow adds the charts of all metrics by itself.
    """
    content = content_of(runs, images or {})
    quality = content.quality
    return {
        "orderByKey": f"metrics.`{quality}`" if quality else "tags.`mlflow.runName`",
        "orderByAsc": not quality or column(quality).better == "lower",
        "searchFilter": f"tags.`{STATE}` = '{CURRENT}'" if any(run.parent for run in runs) else "",
        "selectedColumns": columns(runs, content),
        "columnOrder": ["runDateAndNestInfo", *columns(runs, content)],
        "columnWidths": widths(runs, content),
        "runsHiddenMode": "SHOW_ALL",
        "compareRunSections": [charts.section()],
        "compareRunCharts": charts.cards(content),
        "isAccordionReordered": True,
    }


def rows_view(runs: Sequence[Run]) -> dict[str, Any]:
    """The same with the trials grouped by their labels: numbers and curves are means over seeds."""
    content = content_of(runs, {})
    keys = [{"mode": "param", "groupByData": axis} for axis in content.axes]
    group = {"aggregateFunction": "average", "groupByKeys": keys} if keys else None
    cards = [card for card in charts.cards(content) if card["type"] in ("BAR", "LINE")]
    return {**view(runs), "groupBy": group, "useGroupedValuesInCharts": True, "compareRunCharts": cards}


def content_of(runs: Sequence[Run], images: Mapping[str, int]) -> Content:
    """What the trials have, in the order of the table of their sweep."""
    shown = trials(runs)
    measured = {name for run in shown for name in run.metrics}
    names = metric_columns(runs)
    curves = sorted(name for name in measured if "/" in name)
    return Content(axes_of(runs), quality_of(names, measured), cost_of(names, measured), names, curves, images)


def columns(runs: Sequence[Run], content: Content) -> list[str]:
    """Columns in order: labels, seed, quality with the ends of its interval, cost, then the other numbers."""
    params = [*content.axes, "seed"] if content.axes else param_columns(runs)
    measured = {name for run in trials(runs) for name in run.metrics}
    ends = [f"{content.quality}{end}" for end in ENDS if f"{content.quality}{end}" in measured]
    first = [name for name in (content.quality, *ends, content.cost) if name]
    return [f"params.`{p}`" for p in params] + [f"metrics.`{m}`" for m in dict.fromkeys([*first, *content.metrics])]


def widths(runs: Sequence[Run], content: Content) -> dict[str, int]:
    """Pixels of the columns."""
    kinds = {"params.`seed`": WIDTHS["seed"]}
    return {
        "runDateAndNestInfo": 120,
        **{name: kinds.get(name, WIDTHS["param" if name.startswith("params") else "metric"])
           for name in columns(runs, content)},
    }  # fmt: skip


def image_steps(store: Store, runs: Sequence[Run]) -> dict[str, int]:
    """The last step of each image that `Store.log_image` wrote in these runs."""
    steps: dict[str, int] = {}
    for run in runs:
        if run.tags.get("mlflow.loggedImages"):
            for file in store.file(run.id, "images").glob("*+step+*.png"):
                key, _, suffix = file.name.partition("+step+")
                key, step = key.replace("~", "/"), int(suffix.partition("+")[0])
                steps[key] = max(step, steps.get(key, 0))
    return dict(sorted(steps.items()))


def metric_columns(runs: Sequence[Run]) -> list[str]:
    """The final metrics: those of the sweep's table in its order, then others in that of the lab's tables; curves
    ("train/loss") and ends of intervals are left out."""
    names = {name for run in trials(runs) for name in run.metrics if "/" not in name and not name.endswith(ENDS)}
    listed = listed_in(runs, TABLE_COLUMNS)
    order = {name: i for i, name in enumerate(dict.fromkeys([*listed, *(c.name for c in COLUMNS)]))}
    return sorted(names & (set(listed) or names), key=lambda name: (order.get(name, len(order)), name))


def listed_in(runs: Sequence[Run], tag: str) -> list[str]:
    """The names that a tag of the sweep's run lists."""
    return next((json.loads(run.tags[tag]) for run in runs if tag in run.tags), [])


def axes_of(runs: Sequence[Run]) -> list[str]:
    """The parameters that hold labels, in the order of the ablation's axes."""
    names = dict.fromkeys(name for run in trials(runs) for name in run.params if name.startswith("axis."))
    order = {f"axis.{clean(axis)}": i for i, axis in enumerate(listed_in(runs, TABLE_AXES))}
    return sorted(names, key=lambda name: order.get(name, len(order)))


def param_columns(runs: Sequence[Run]) -> list[str]:
    """The parameters in which trials differ, those with the fewest values first."""
    params = [run.params for run in trials(runs)]
    values = {name: {p.get(name) for p in params} for name in {name for p in params for name in p}}
    differing = [name for name in values if len(values[name]) > 1]
    return sorted(differing, key=lambda name: (len(values[name]), name.count("."), name))[:MAX_PARAMS]


def trials(runs: Sequence[Run]) -> Sequence[Run]:
    """The children of sweeps that are not superseded, or every run where there are none."""
    children = [run for run in runs if run.parent]
    return [run for run in children if run.tags.get(STATE, CURRENT) == CURRENT] or children or runs
