"""Heartbeats of runs: a tag that a worker renews, by which a run that is open is known to be at work or left behind."""

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Sequence
from typing import Any

from sana_lab.tracking.store import Run, Store

BEAT = "sana.heartbeat"
"""Tag of a run that is worked on: seconds since 1970."""

WORKER = "sana.worker"
"""Tag of a run: host and process id of the worker that took it up last."""

FOLDER = "sana.folder"
"""Tag of a run on a server: identity of the folder of runs that works on it."""

SECONDS = 30.0
"""Between two beats."""

STALE = 4 * SECONDS
"""Seconds after the last beat at which a run counts as left behind."""


class Heartbeat:
    """Renew the beat of runs in a thread until the block ends; a store that does not answer is tried again."""

    def __init__(self, store: Store, runs: Sequence[str], seconds: float = SECONDS) -> None:
        self.store, self.runs, self.seconds = store, list(runs), seconds
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> "Heartbeat":
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.ended.set()
        self.thread.join(5)

    def _renew(self) -> None:
        place = {WORKER: f"{socket.gethostname()}:{os.getpid()}", FOLDER: folder_id(self.store)}
        while True:
            for run in self.runs:
                try:
                    self.store.set_tags(run, {BEAT: f"{time.time():.0f}", **place})
                except Exception:  # of any kind of store: the next beat may reach it, and work goes on without
                    break
            if self.ended.wait(self.seconds):
                return


def folder_id(store: Store) -> str | None:
    """The identity of a folder of runs whose records are on a server, where other folders may have the same sweep."""
    if store.server is None:
        return None
    path = store.home / "folder"
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError), path.open("x") as file:
        file.write(uuid.uuid4().hex)
    return path.read_text()


def works_elsewhere(store: Store, run: Run) -> bool:
    """Whether a worker of another folder has renewed a run lately."""
    return store.server is not None and beats(run) and run.tags.get(FOLDER) != folder_id(store)


def beats(run: Run, now: float | None = None) -> bool:
    """Whether a run is open and a worker has renewed it lately."""
    last = float(run.tags.get(BEAT, 0))
    return run.status == "RUNNING" and (time.time() if now is None else now) - last < STALE
