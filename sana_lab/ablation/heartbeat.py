"""Heartbeats of runs: a tag that a worker renews, by which a run that is open is known to be at work or left behind."""

import contextlib
import getpass
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

USER = "sana.user"
"""Tag of a run on a server: who works on it."""

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
        while True:
            for run in self.runs:
                try:
                    self.store.set_tags(run, signs(self.store))
                except Exception:  # of any kind of store: the next beat may reach it, and work goes on without
                    break
            if self.ended.wait(self.seconds):
                return


def signs(store: Store) -> dict[str, str | None]:
    """The tags of a run that this process works on now."""
    where = {} if store.server is None else {USER: user(), FOLDER: folder_id(store)}
    return {BEAT: f"{time.time():.0f}", WORKER: f"{socket.gethostname()}:{os.getpid()}", **where}


def user() -> str:
    """The name of the user of this process, or the number where it has none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


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


def check_alone(store: Store, name: str) -> None:
    """ValueError if another folder works on a sweep of this name, on the same server: on a trial, or on the sweep while
    its trials wait."""
    if store.server is None:
        return
    for run in store.summaries(name):
        if works_elsewhere(store, run):
            host, _, process = run.tags.get(WORKER, "an unknown host").partition(":")
            silent = time.time() - float(run.tags[BEAT])
            raise ValueError(
                f"an ablation named {name!r} runs on {store.server} from another folder: by "
                f"{run.tags.get(USER, 'an unknown user')} on {host}, process {process}, sign of life {silent:.0f} s "
                f"ago; wait for its end ({STALE:.0f} s if it was killed), or run a copy of the file under another name"
            )


def beats(run: Run, now: float | None = None) -> bool:
    """Whether a run is open and a worker has renewed it lately."""
    last = float(run.tags.get(BEAT, 0))
    return run.status == "RUNNING" and (time.time() if now is None else now) - last < STALE
