"""The saved view: columns, order, pictures."""

import base64
import json
import zlib

import pytest

from sana_lab.tracking.store import Run
from sana_lab.tracking.view import image_steps, metric_columns, param_columns, view, write_view

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
    assert state["selectedColumns"] == ["metrics.`gmacs`", "metrics.`geneval`", "metrics.`mystery`"]


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
    assert state["selectedColumns"] == ["metrics.`geneval`", "params.`attention`"]
    assert [(c["imageKeys"], c["step"]) for c in state["compareRunCharts"]] == [(["samples/held out"], 3)]
    assert state["compareRunCharts"][0]["metricSectionId"] == state["compareRunSections"][0]["uuid"]


def test_pictures_show_their_last_step(store):
    assert image_steps(store, store.find("sweep")) == {"samples/held out": 3}
    assert image_steps(store, []) == {}
    assert "compareRunCharts" not in view([a_run("a")])
