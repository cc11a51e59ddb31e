"""The saved view: columns, order, pictures."""

import base64
import json
import zlib

import pytest

from sana_lab.tracking.store import Run
from sana_lab.tracking.view import image_steps, metric_columns, param_columns, rows_view, view, write_view

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


def a_run(name, parent="p", params=None, **metrics):
    return Run(name, name, "FINISHED", {}, params or {}, metrics, 0.0, 1.0, "1", parent)


def test_a_view_shows_children_with_the_best_first():
    runs = [
        a_run("sweep", None, trials=2),
        a_run("a", geneval=0.5, geneval_low=0.4, gmacs=1.0),
        a_run("b", mystery=1.0),
    ]
    state = view(runs)
    assert (state["orderByKey"], state["orderByAsc"]) == ("metrics.`geneval`", False)
    assert state["selectedColumns"] == [f"metrics.`{name}`" for name in ("geneval", "geneval_low", "gmacs", "mystery")]


def test_quality_comes_before_costs_whatever_the_order_of_the_table():
    """Latency has an interval too, and was what the view sorted by."""
    tags = {"sana.columns": '["params_m", "latency_s", "exact", "geneval"]', "sana.axes": '["width", "attention"]'}
    sweep = a_run("sweep", None)._replace(tags=tags)
    labels = {"axis.attention": "linear", "axis.width": "64", "seed": "1", "system.dit.name": "sana"}
    numbers = {"batch": 1.0, "latency_s": 0.2, "exact": 0.5, "exact_low": 0.4, "exact_high": 0.6, "geneval": 0.7}
    state = view([sweep, a_run("a", params=labels, params_m=1.0, **numbers)])
    assert (state["orderByKey"], state["orderByAsc"]) == ("metrics.`exact`", False)
    params = [f"params.`{name}`" for name in ("axis.width", "axis.attention", "seed")]
    metrics = [f"metrics.`{n}`" for n in ("exact", "exact_low", "exact_high", "latency_s", "params_m", "geneval")]
    assert state["selectedColumns"] == params + metrics
    assert sum(state["columnWidths"][name] for name in state["columnOrder"][:8]) < 750  # of 1,280 pixels
    assert state["searchFilter"] == "tags.`sana.state` = 'current'"


def test_superseded_trials_count_for_nothing():
    gone = a_run("gone", psnr=1.0)._replace(tags={"sana.state": "superseded"})
    assert metric_columns([gone, a_run("a", ssim=1.0)]) == ["ssim"]


def test_eight_charts_quality_first():
    labels = {"axis.attention": "linear", "axis.depth": "one"}
    curves = {"train/loss": 1.0, "val/loss": 1.0, "points/exact": 0.2}
    run = a_run("a", params=labels, exact=0.5, latency_s=0.1, gmacs=1.0, **curves)
    cards = view([run, run], {"final": 0, "samples": 200})["compareRunCharts"]
    assert [card["type"] for card in cards] == ["BAR", *["SCATTER"] * 3, *["LINE"] * 2, "PARALLEL", "IMAGE"]
    assert cards[0]["metricKey"] == "exact"
    assert [card["xaxis"]["key"] for card in cards[1:4]] == ["axis.attention", "axis.depth", "latency_s"]
    assert [card["metricKey"] for card in cards[4:6]] == ["points/exact", "train/loss"]
    assert (cards[6]["selectedParams"], cards[6]["selectedMetrics"]) == (list(labels), ["latency_s", "exact"])
    assert len({card["uuid"] for card in cards}) == 8


def test_the_view_of_rows_groups_by_every_axis():
    run = a_run("a", params={"axis.attention": "linear", "axis.depth": "one"}, exact=0.5)
    state = rows_view([run])
    assert [key["groupByData"] for key in state["groupBy"]["groupByKeys"]] == ["axis.attention", "axis.depth"]
    assert rows_view([a_run("a")])["groupBy"] is None


def test_a_view_sorts_a_distance_upwards_and_anything_else_by_name():
    assert view([a_run("a", fid=3.0)])["orderByAsc"] is True
    assert view([a_run("a", params_m=3.0)])["orderByKey"] == "tags.`mlflow.runName`"


def test_curves_and_intervals_are_no_columns_and_lone_runs_count_where_there_are_no_sweeps():
    assert metric_columns([a_run("a", None, psnr_low=1.0, **{"train/loss": 1.0, "psnr": 2.0})]) == ["psnr"]


def test_only_parameters_that_differ_are_columns():
    trials = [a_run(str(i), params={"dim": "8", "attention": str(i % 2), "lr": str(i)}) for i in range(4)]
    assert param_columns(trials) == ["attention", "lr"]
    assert param_columns([a_run("a", params={"x": "1"}), a_run("b")]) == ["x"]


def test_the_view_is_saved_where_mlflow_looks(store):
    identity = store.experiments()["sweep"]
    write_view(store, identity)
    write_view(store, identity)  # again, as each start of the server does
    tags = store.client.get_experiment(identity).tags
    shared = json.loads(tags["mlflow.sharedViewState.sana-lab"])
    header, payload = shared["state"].split(";")
    assert header == "deflate"
    state = json.loads(zlib.decompress(base64.b64decode(payload)))
    assert state["selectedColumns"] == ["params.`attention`", "metrics.`geneval`"]
    images = [card for card in state["compareRunCharts"] if card["type"] == "IMAGE"]
    assert [(card["imageKeys"], card["step"]) for card in images] == [(["samples/held out"], 3)]
    assert state["compareRunCharts"][0]["metricSectionId"] == state["compareRunSections"][0]["uuid"]


def test_pictures_show_their_last_step(store):
    assert image_steps(store, store.find("sweep")) == {"samples/held out": 3}
    assert image_steps(store, []) == {}
    assert view([a_run("a")])["compareRunCharts"] == []
