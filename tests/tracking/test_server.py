"""The server in earnest (slow), and what it is asked to show."""

import base64
import json
import signal
import socket
import subprocess
import sys
import urllib.parse
import urllib.request
import zlib

import pytest
import torch

from sana_lab.tracking.server import (
    charts_link,
    differing_params,
    free_port,
    image_steps,
    runs_link,
    serve,
    shown_metrics,
    view,
    write_view,
)
from sana_lab.tracking.store import Run, Store

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


def a_run(name, parent="p", params=None, **metrics):
    return Run(name, name, "FINISHED", {}, params or {}, metrics, 0.0, 1.0, "1", parent)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    made = Store(tmp_path_factory.mktemp("home"))
    parent = made.start_run("sweep", "sweep")
    for i in range(2):
        child = made.start_run("sweep", f"child {i}", parent=parent)
        made.log_params(child, {"attention": str(i), "depth": 2})
        made.log_metrics(child, {"geneval": 0.5 + i, "train/loss": 0.1})
        for step in range(2 + 2 * i):
            made.log_image(child, "samples/held out", torch.zeros(3, 8, 8, dtype=torch.uint8), step=step)
        made.finish(child)
    made.finish(parent)
    return made


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
    assert shown_metrics([a_run("a", None, psnr_low=1.0, **{"train/loss": 1.0, "psnr": 2.0})]) == ["psnr"]


def test_only_parameters_that_differ_are_columns():
    trials = [a_run(str(i), params={"dim": "8", "attention": str(i % 2), "lr": str(i)}) for i in range(4)]
    assert differing_params(trials) == ["attention", "lr"]
    assert differing_params([a_run("a", params={"x": "1"}), a_run("b")]) == ["x"]


def test_links_open_the_pages_for_training_and_the_saved_view():
    link = runs_link("http://127.0.0.1:5000", "7")
    assert link == "http://127.0.0.1:5000/#/experiments/7/runs?workflowType=machine_learning&viewStateShareKey=sana-lab"
    assert charts_link("http://127.0.0.1:5000", "7") == link + "&compareRunsMode=CHART"


def test_a_busy_port_gives_way_to_the_next():
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        assert port < free_port("127.0.0.1", port) <= port + 50
        with pytest.raises(ValueError, match=f"no free port from {port} to {port}"):
            free_port("127.0.0.1", port, tries=1)
    assert free_port("127.0.0.1", port) == port


def test_other_machines_and_empty_homes_are_refused(tmp_path, store):
    with pytest.raises(ValueError, match=r"'0\.0\.0\.0' is not this machine .* has no password"):
        serve(store.home, host="0.0.0.0")
    with pytest.raises(ValueError, match=r"no runs under .*; make some first"):
        serve(tmp_path)


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


@pytest.mark.slow
def test_the_server_answers_on_loopback_and_ends_with_everything_it_started(store):
    port = free_port("127.0.0.1", 5600)
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # background jobs ignore it
    code = f"{heard}; from sana_lab.tracking.server import serve; serve({str(store.home)!r}, port={port})"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            said = said_until(process, "Ctrl-C stops it", store)
            answers(store, f"http://127.0.0.1:{port}", said)
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=60) == ("stopped\n", None)
        finally:
            process.terminate()  # which ends its server too
    assert process.returncode == 0
    assert free_port("127.0.0.1", port) == port


def said_until(process, last, store):
    said = []
    while not said or last not in said[-1]:
        said.append(process.stdout.readline())
        assert said[-1], (said, (store.home / "ui.log").read_text())
    return said


def answers(store, base, said):
    identity = store.experiments()["sweep"]
    assert f"sweep: {runs_link(base, identity)}\n" in said
    runs = post(f"{base}/api/2.0/mlflow/runs/search", {"experiment_ids": [identity]})["runs"]
    assert len(runs) == 3
    child = next(r["info"]["run_id"] for r in runs if r["info"]["run_name"] == "child 0")
    file = next(store.file(child, "images").glob("*.png"))
    query = urllib.parse.urlencode({"run_id": child, "path": f"images/{file.name}"})
    with urllib.request.urlopen(f"{base}/get-artifact?{query}") as answer:
        assert answer.read() == file.read_bytes()


def post(url, data):
    request = urllib.request.Request(url, json.dumps(data).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)
