"""The server in earnest (slow), its links and its port."""

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request

import pytest

from sana_lab.tracking.server import charts_link, free_port, runs_link, serve

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


def test_links_open_the_pages_for_training_and_the_saved_view():
    link = runs_link("http://127.0.0.1:5000", "7")
    assert link == "http://127.0.0.1:5000/#/experiments/7/runs?workflowType=machine_learning&viewStateShareKey=sana-lab"
    assert charts_link(link) == link + "&compareRunsMode=CHART"


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


@pytest.mark.slow
def test_the_server_answers_on_loopback_and_sigint_ends_it(store):
    port = free_port("127.0.0.1", 5600)
    code = f"from sana_lab.tracking.server import serve; serve({str(store.home)!r}, port={port})"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            lines = [process.stdout.readline() for _ in range(3)]
            assert "Ctrl-C stops it" in lines[2]
            wait_for(f"http://127.0.0.1:{port}/health", process)
            check_answers(store, f"http://127.0.0.1:{port}", lines)
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
    assert free_port("127.0.0.1", port) == port  # nothing that it started is left


def wait_for(url, process):
    end = time.monotonic() + 180
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.2)


def check_answers(store, base, lines):
    identity = store.experiments()["sweep"]
    assert lines[0] == f"sweep: {runs_link(base, identity)}\n"
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
