"""What waits for a server on disk: nothing is lost or sent twice; a server that is away is tried ever less often."""

import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from mlflow.exceptions import MlflowException
from requests import HTTPError, Response
from stand_in_server import Server

from sana_lab.tracking import outbox as module
from sana_lab.tracking.logger import RunLogger
from sana_lab.tracking.outbox import FIRST_PAUSE, LONGEST_PAUSE, Outbox, deliver_all
from sana_lab.tracking.store import Point, Store, to_pil

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")

IMAGE = np.zeros((4, 6, 3), np.uint8)
PICTURE = to_pil(IMAGE)


@pytest.fixture
def store(server: Server) -> Store:
    return server.store()


@pytest.fixture
def run(store: Store) -> str:
    return store.start_run("training", "tiny")


def point(step: int) -> Point:
    return Point("loss", 1.0 / step, step, 1000.0 + step)


def waiting(store: Store) -> list[str]:
    """Endings of the files that wait."""
    return [path.suffix for path in sorted((store.home / "outbox").glob("*.*")) if path.suffix != ".lock"]


class TestLogger:
    def test_images_and_points_wait_for_a_server_that_is_away(self, server, store, run):
        logger = RunLogger(store, run, seconds=0.0)
        server.away = True
        logger.log_image("val/samples", IMAGE, 3)
        with pytest.warns(UserWarning, match="MLflow's server does not answer; curves and images wait in"):
            logger.log_metrics({"loss": 0.5}, 4)
        assert waiting(store) == [".png", ".jsonl"]
        server.away = False
        logger.finalize("success")
        assert server.points(run, "loss") == [(4, 0.5)]
        assert server.images(run) == ["val~samples 3"]
        assert waiting(store) == []

    def test_a_server_that_stays_away_is_tried_once(self, server, store, run):
        logger = RunLogger(store, run, seconds=0.0)
        server.away = True
        with pytest.warns(UserWarning, match="does not answer"):
            logger.log_metrics({"loss": 1.0}, 1)
        for step in range(2, 50):
            logger.log_metrics({"loss": 1.0}, step)
        assert server.failures == 1
        assert len(Outbox(store, run).points()) == 49

    def test_steps_of_a_curve_are_those_of_run_outbox_and_buffer(self, server, store, run):
        store.log_points(run, [point(1)])
        Outbox(store, run).add([point(2)])
        logger = RunLogger(store, run)
        logger.log_metrics({"loss": 1.0}, 3)
        assert logger.steps("loss") == {1, 2, 3}
        logger.log_metrics({"loss": 1.0}, 4)
        server.away = True
        assert logger.steps("loss") == {1, 2, 3, 4}
        assert RunLogger(store, run).steps("loss") == {2}

    def test_a_full_disk_keeps_the_points_and_stops_nothing(self, store, run, monkeypatch):
        logger = RunLogger(store, run, seconds=0.0)
        with monkeypatch.context() as patch:
            patch.setattr(module, "write_text", full)
            with pytest.warns(UserWarning, match="1 points of curves wait, as they cannot be written: .*no room"):
                logger.log_metrics({"loss": 0.5}, 1)
        logger.finalize("success")
        assert store.history(run, "loss") == [(1, 0.5)]


def full(*_: object) -> None:
    raise OSError("the disk has no room for it")


class TestDelivery:
    def test_points_that_are_added_meanwhile_wait_for_the_next(self, server, store, run, monkeypatch):
        """A worker adds a point between the reading and the removal of another process."""
        outbox = Outbox(store, run)
        outbox.add([point(1)])
        log = Store.log_points

        def log_and_add(self: Store, *arguments: object) -> None:
            log(self, *arguments)
            Outbox(store, run).add([point(2)])

        with monkeypatch.context() as patch:
            patch.setattr(Store, "log_points", log_and_add)
            assert not outbox.deliver()
        assert outbox.points() == [point(2)]
        assert deliver_all(store) == 0
        assert server.points(run, "loss") == [(1, 1.0), (2, 0.5)]

    def test_one_process_at_a_time_sends(self, server, store, run, capsys):
        outbox = Outbox(store, run)
        outbox.add([point(1)])
        with FileLock(outbox.folder / f"{run}.lock"):
            assert deliver_all(store) == 1
        assert "another process sends what waits" in capsys.readouterr().err
        assert "log_batch" not in server.calls
        assert outbox.deliver()
        assert server.calls.count("log_batch") == 1

    def test_what_a_kill_left_is_not_there_twice(self, server, store, run, monkeypatch):
        """The process was killed after the server had all, and before it removed the files."""
        outbox = Outbox(store, run)
        outbox.add([point(1)])
        outbox.add_image("samples", PICTURE, 1)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", lambda *_, **__: None)
            outbox.deliver()
        assert waiting(store) == [".jsonl", ".png"]
        assert deliver_all(store) == 0
        assert (server.points(run, "loss"), server.images(run)) == ([(1, 1.0)], ["samples 1"])

    def test_points_of_an_earlier_version_are_sent_without_the_line_of_a_kill(self, server, store, run):
        (store.home / "outbox").mkdir(parents=True)
        (store.home / "outbox" / f"{run}.jsonl").write_text('["loss", 1.0, 1, 1001.0]\n["loss", 0.5')
        assert deliver_all(store) == 0
        assert server.points(run, "loss") == [(1, 1.0)]

    def test_the_pause_doubles_while_the_server_is_away(self, server, store, run, monkeypatch):
        now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: now)
        outbox = Outbox(store, run)
        outbox.add([point(1)])
        server.away, pauses = True, []
        for _ in range(8):
            assert not outbox.deliver()
            pauses.append(outbox.next_try - now)
            now = outbox.next_try
        assert pauses[:3] == [FIRST_PAUSE, 2 * FIRST_PAUSE, 4 * FIRST_PAUSE]
        assert pauses[-1] == LONGEST_PAUSE
        server.away, now = False, now - 1
        assert not outbox.deliver()  # in the pause
        assert outbox.deliver(patience=1.0)
        assert outbox.pause == 0.0


class TestRefusals:
    @pytest.mark.parametrize("hard", [False, True], ids=["deleted", "and removed by gc"])
    def test_what_waits_for_a_deleted_run_is_set_aside_and_said_once(self, server, store, run, capsys, hard):
        outbox = Outbox(store, run)
        outbox.add([point(1)])
        outbox.add_image("samples", PICTURE, 1)
        server.inner.delete_run(run)
        if hard:
            server.inner._tracking_client.store._hard_delete_run(run)
        assert deliver_all(store) == 0
        outbox.add([point(2)])
        assert deliver_all(store) == 0
        refused = store.home / "outbox/refused"
        assert capsys.readouterr().err == (
            f"sana-lab: run {run}: it was deleted on the server; what waited for it is kept in {refused}\n"
        )
        assert sorted(path.suffix for path in refused.iterdir()) == [".jsonl", ".jsonl", ".png"]
        assert waiting(store) == []

    def test_other_refusals_keep_the_files_and_stop_no_command(self, server, store, run, monkeypatch, capsys):
        Outbox(store, run).add([point(1)])
        with monkeypatch.context() as patch:
            patch.setattr(Store, "log_points", forbidden)
            assert deliver_all(store) == 1
        assert capsys.readouterr().err == f"sana-lab: run {run}: PERMISSION_DENIED: no\n"
        assert deliver_all(store) == 0
        assert server.points(run, "loss") == [(1, 1.0)]

    def test_an_image_that_is_too_large_keeps_no_other_back(self, server, store, run, monkeypatch, capsys):
        outbox, log = Outbox(store, run), Store.log_image
        for step in (1, 2):
            outbox.add_image("samples", PICTURE, step)

        def limited(self: Store, run: str, key: str, image: object, step: int, moment: float) -> None:
            if step == 1:
                response = Response()
                response.status_code = 413
                raise HTTPError("413 Client Error: Request Entity Too Large", response=response)
            log(self, run, key, image, step, moment)

        monkeypatch.setattr(Store, "log_image", limited)
        assert outbox.deliver()
        assert "an image is too large for the server (status 413)" in capsys.readouterr().err
        assert server.images(run) == ["samples 2"]

    def test_an_error_of_the_storage_of_artifacts_lets_the_image_wait(self, server, store, run, monkeypatch):
        outbox = Outbox(store, run)
        outbox.add_image("samples", PICTURE, 1)
        with monkeypatch.context() as patch:
            patch.setattr(Store, "log_image", broken)
            assert not outbox.deliver()
        assert outbox.reason == "RuntimeError: the bucket is away"
        assert outbox.deliver(patience=1.0)
        assert server.images(run) == ["samples 1"]


def forbidden(*_: object) -> None:
    raise MlflowException("PERMISSION_DENIED: no")


def broken(*_: object) -> None:
    raise RuntimeError("the bucket is away")
