"""What executors on clusters share: a job of a file, a worker's lines in a file beside it, and its status.

The folder of runs is on a file system that every node has.
"""

import contextlib
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from sana_lab.ablation.executors import Show
from sana_lab.ablation.executors.warm import WarmWorker

PASSED = ("MLFLOW_", "HF_", "PYTHONPATH", "OMP_", "RAY_AUTH_", "SANA_LAB_")
"""Beginnings of the variables of the environment that jobs on other machines get."""

_workers: dict[tuple[tuple[str, str], ...], WarmWorker] = {}


def variables() -> dict[str, str]:
    """Variables of this environment for jobs on other machines: tracking server, credentials, caches."""
    return {name: value for name, value in os.environ.items() if name.startswith(PASSED)}


def run_job(folder: str, path: str, log: str, environment: Mapping[str, str]) -> int:
    """Do a job on a node, in the worker process that this process has for such an environment; the exit status."""
    os.chdir(folder)
    devices = {name: os.environ[name] for name in ("CUDA_VISIBLE_DEVICES",) if name in os.environ}
    key = tuple(sorted({**environment, **devices}.items()))
    for other in _workers.keys() - {key}:
        _workers.pop(other).close()  # its devices may be another job's now
    worker = _workers.setdefault(key, WarmWorker(environment))
    with lines_of(Path(path)).open("a") as lines:

        def show(line: str) -> None:
            lines.write(line)
            lines.flush()

        return worker.run(Path(path), Path(log), show, keep=True)


def terminate_workers(seconds: float) -> None:
    """Have the worker of this process end, a training with a checkpoint, and wait for that, so long at most."""
    for worker in _workers.values():
        worker.terminate()
    end = time.monotonic() + seconds
    for worker in _workers.values():
        worker.wait(end - time.monotonic())


def lines_of(job: Path) -> Path:
    """The file with the lines that a job prints."""
    return job.with_suffix(".lines")


def add_text(path: Path, text: str) -> None:
    """Write text to the end of a file."""
    with path.open("a") as file:
        file.write(text)


class Tail(threading.Thread):
    """Shows the lines of files as they grow, once a second."""

    def __init__(self, show: Show, seconds: float = 1.0) -> None:
        super().__init__(daemon=True)
        self.show, self.seconds = show, seconds
        self.places: dict[Path, int] = {}
        self.lock, self.ended = threading.Lock(), threading.Event()

    def follow(self, path: Path) -> None:
        """Show the lines of a file from its beginning, which may not exist yet."""
        path.unlink(missing_ok=True)
        with self.lock:
            self.places[path] = 0

    def leave(self, path: Path) -> None:
        """Show what is left, and delete the file."""
        with self.lock:
            self._read(path)
            self.places.pop(path, None)
        path.unlink(missing_ok=True)

    def run(self) -> None:
        while not self.ended.wait(self.seconds):
            with self.lock:
                for path in list(self.places):
                    self._read(path)

    def _read(self, path: Path) -> None:
        with contextlib.suppress(OSError), path.open() as file:
            file.seek(self.places.get(path, 0))
            while (line := file.readline()).endswith("\n"):
                self.places[path] = file.tell()
                self.show(line)
