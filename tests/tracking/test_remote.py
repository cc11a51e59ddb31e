"""Runs on a real MLflow server that is killed and started again: nothing is lost, and nothing is written twice."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from sana_lab.ablation.heartbeat import Heartbeat, works_elsewhere
from sana_lab.tracking import remote
from sana_lab.tracking.logger import RunLogger
from sana_lab.tracking.outbox import Outbox, deliver_all
from sana_lab.tracking.server import environment
from sana_lab.tracking.store import Point, Store

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:MLflow's server does not answer"),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]


class Server:
    """An MLflow server of this machine on one port, which can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        with closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder, self.address = folder, f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        storage = ["--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        storage += ["--artifacts-destination", str(self.folder / "artifacts")]
        place = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        with (self.folder / "server.log").open("a") as log:
            command = [sys.executable, "-m", "mlflow", "server", *storage, *place]
            options = {"env": environment(), "stdout": log, "stderr": log, "start_new_session": True}
            self.process = subprocess.Popen(command, **options)
        end = time.monotonic() + 200
        while time.monotonic() < end and not self.answers():
            time.sleep(0.5)

    def answers(self) -> bool:
        try:
            remote.check(self.address)
        except ValueError:
            return False
        return True

    def kill(self) -> None:
        """SIGKILL to the server and its worker."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


@pytest.fixture
def store(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    for name in ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}.get(name, "1"))
    return Store(tmp_path / "runs")


def history(store: Store, run: str) -> list[tuple[int, float]]:
    """Every point of a curve, also those that are written twice."""
    return [(m.step, m.value) for m in store.client.get_metric_history(run, "loss")]


def test_runs_artifacts_and_summaries(store: Store):
    run = store.start_run("one", "first", {"sana.kind": "trial"})
    store.log_dict(run, {"a": 1}, "config/a.json")
    store.log_metrics(run, {"fid": 2.5})
    assert store.file(run, "config/a.json").read_text().replace(" ", "").replace("\n", "") == '{"a":1}'
    with pytest.raises(FileNotFoundError, match=r"has no artifact 'b.json'"):
        store.file(run, "b.json")
    store.finish(run)
    (summary,) = store.summaries("one")
    assert (summary.id, summary.status, summary.metrics) == (run, "FINISHED", {"fid": 2.5})
    assert not (store.home / "mlflow.db").exists()


def test_points_of_a_server_that_is_lost_come_once_it_is_back(store: Store, server: Server):
    run = store.start_run("lost", "training")
    logger = RunLogger(store, run, seconds=0.0)
    logger.log_metrics({"loss": 1.0}, 1)
    server.kill()
    start = time.monotonic()
    for step in (2, 3):
        logger.log_metrics({"loss": 1.0 / step}, step)
    assert time.monotonic() - start < 30  # training goes on
    assert len(Outbox(store, run).points()) == 2
    server.start()
    logger.log_metrics({"loss": 0.25}, 4)
    logger.finalize("success")
    assert history(store, run) == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)]
    assert Outbox(store, run).files() == []


def test_what_a_killed_process_left_is_sent_by_the_next_and_not_twice(store: Store):
    run = store.start_run("left", "training")
    points = [Point("loss", 1.0 / step, step, 1000.0 + step) for step in (1, 2, 3)]
    outbox = Outbox(store, run)
    outbox.add(points)
    store.log_points(run, points[:2])  # the server has had these, and the process was killed before it knew
    assert deliver_all(store) == 0
    assert history(store, run) == [(1, 1.0), (2, 0.5), (3, 1 / 3)]


def test_a_trial_that_another_folder_works_on_is_known(store: Store, tmp_path: Path):
    run = store.start_run("shared", "trial")
    with Heartbeat(store, [run]):
        end = time.monotonic() + 30
        while "sana.heartbeat" not in store.run(run).tags and time.monotonic() < end:
            time.sleep(0.2)
    other = Store(tmp_path / "other")
    assert works_elsewhere(other, store.run(run))
    assert not works_elsewhere(store, store.run(run))


def test_images_of_a_server_that_is_lost_come_once_it_is_back(store: Store, server: Server):
    run = store.start_run("pictures", "training")
    logger, outbox = RunLogger(store, run, seconds=0.0), Outbox(store, run)
    server.kill()
    logger.log_image("samples", np.zeros((8, 8, 3), np.uint8), 3)
    logger.log_metrics({"loss": 1.0}, 3)
    assert [path.suffix for path in outbox.files()] == [".png", ".jsonl"]
    server.start()
    (picture,) = outbox.files(".png")
    content = picture.read_bytes()
    logger.finalize("success")
    assert outbox.files() == []
    picture.write_bytes(content)  # as if a kill came between the sending and the removal
    assert deliver_all(store) == 0
    assert len([f for f in store.client.list_artifacts(run, "images") if f.path.endswith(".png")]) == 1
    assert store.run(run).tags["mlflow.loggedImages"] == "True"


def test_removed_runs_and_sweeps_are_hidden(store: Store, capsys: pytest.CaptureFixture[str]):
    kept, run = store.start_run("removed", "kept"), store.start_run("removed", "run")
    store.delete_run(run)
    assert [each.id for each in store.find("removed")] == [kept]
    Outbox(store, run).add([Point("loss", 1.0, 1, 1000.0)])
    assert deliver_all(store) == 0
    assert "it was deleted on the server" in capsys.readouterr().err
    store.delete("removed")
    assert "removed" not in store.experiments()
    new = store.start_run("removed", "new")
    assert [each.id for each in store.find("removed")] == [new]
    assert ("removed", new) in [(name, each.id) for name, each in store.recorded()]
