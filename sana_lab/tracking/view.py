"""A shared view of MLflow's runs page: columns, their order, and images."""

import base64
import json
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from sana_lab.report.columns import COLUMNS, ENDS
from sana_lab.tracking.store import Run, Store

VIEW = "sana-lab"
"""Key of the view among an experiment's tags, and in links."""

MAX_PARAMS = 6
"""Columns of parameters."""


def write_view(store: Store, experiment: str) -> None:
    """Save the view that the links open: flat (a child of a sweep is a row like any other), the best first.

    MLflow keeps shared views as tags of the experiment, in an undocumented format; a version that reads another format
    shows its own default view.
    """
    runs = store.all_runs(experiment)
    now = int(time.time() * 1000)
    text = json.dumps(view(runs, image_steps(store, runs)))
    state = "deflate;" + base64.b64encode(zlib.compress(text.encode())).decode()
    shared = {"name": "sana-lab: every trial", "createdAt": now, "updatedAt": now, "state": state}
    store.client.set_experiment_tag(experiment, f"mlflow.sharedViewState.{VIEW}", json.dumps(shared))


def view(runs: Sequence[Run], images: Mapping[str, int] | None = None) -> dict[str, Any]:
    """The state of MLflow's runs page: columns, an order (any but by date shows children as rows), pictures first.

    `images` maps the keys of logged images to the step to show. MLflow adds the charts of all metrics by itself.
    """
    metrics = metric_columns(runs)
    quality = [c for c in COLUMNS if c.interval and c.name in metrics][:1]
    columns = [f"metrics.`{name}`" for name in metrics] + [f"params.`{name}`" for name in param_columns(runs)]
    return {
        "orderByKey": f"metrics.`{quality[0].name}`" if quality else "tags.`mlflow.runName`",
        "orderByAsc": not quality or quality[0].better == "lower",
        "selectedColumns": columns,
        "runsHiddenMode": "FIRST_20_RUNS",
    } | (_pictures(images) if images else {})


def _pictures(images: Mapping[str, int]) -> dict[str, Any]:
    """A wide section of one chart for each image, without the hundred parameters that would hide it."""
    section = {"uuid": VIEW, "name": "Pictures", "display": True, "isReordered": True, "columns": 1, "cardHeight": 560}
    common = {"type": "IMAGE", "metricSectionId": VIEW, "deleted": False, "isGenerated": False, "showRunParams": False}
    charts = [common | {"uuid": f"{VIEW}-{k}", "imageKeys": [k], "displayName": k, "step": images[k]} for k in images]
    return {"compareRunSections": [section], "compareRunCharts": charts, "isAccordionReordered": True}


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
    """The final metrics, in the order of the lab's tables; curves ("train/loss") and ends of intervals are left out."""
    names = {name for run in trials(runs) for name in run.metrics if "/" not in name and not name.endswith(ENDS)}
    order = {c.name: i for i, c in enumerate(COLUMNS)}
    return sorted(names, key=lambda name: (order.get(name, len(order)), name))


def param_columns(runs: Sequence[Run]) -> list[str]:
    """The parameters in which trials differ, those with the fewest values first."""
    params = [run.params for run in trials(runs)]
    values = {name: {p.get(name) for p in params} for name in {name for p in params for name in p}}
    differing = [name for name in values if len(values[name]) > 1]
    return sorted(differing, key=lambda name: (len(values[name]), name.count("."), name))[:MAX_PARAMS]


def trials(runs: Sequence[Run]) -> Sequence[Run]:
    """The children of sweeps, or every run where there are none."""
    return [run for run in runs if run.parent] or runs
