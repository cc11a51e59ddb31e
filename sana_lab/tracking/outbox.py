"""Curves and images on their way to a server: on disk until it has them.

Each batch of points and each image is a file that is written whole and removed once it is sent; one process at a time
sends those of a run. A point is sent with its own time, and MLflow stores equal points once; an image whose time the
run has is not sent again. So a kill loses nothing and duplicates nothing.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sana_lab.config.atomic_write import replacing, write_text
from sana_lab.tracking import remote
from sana_lab.tracking.store import Point, Store

if TYPE_CHECKING:
    from PIL.Image import Image

FIRST_PAUSE, LONGEST_PAUSE = 10.0, 300.0
"""Seconds without a try after a failure; each failure doubles them, up to the longest."""

POINTS, IMAGE = ".jsonl", ".png"
"""Endings of the files."""


class Outbox:
    """What a server does not have yet of one run: points and images in `home/outbox/RUN.*`."""

    def __init__(self, store: Store, run_id: str) -> None:
        self.store, self.run_id = store, run_id
        self.folder: Path = store.home / "outbox"
        self.reason = ""  # why the last try failed; empty after a success, and where nothing was tried
        self.pause, self.next_try = 0.0, 0.0  # seconds; by the monotonic clock

    def add(self, points: Sequence[Point]) -> None:
        """Write points to disk."""
        if points:
            write_text(self._new_path(POINTS), "".join(json.dumps(point) + "\n" for point in points))

    def add_image(self, key: str, image: "Image", step: int) -> None:
        """Write an image to disk, with its key, its step and its time."""
        from PIL.PngImagePlugin import PngInfo

        about = PngInfo()
        for name, value in {"key": key, "step": str(step), "time": f"{time.time():.3f}"}.items():
            about.add_text(name, value)
        with replacing(self._new_path(IMAGE)) as partial:
            image.save(partial, "PNG", pnginfo=about)

    def points(self) -> list[Point]:
        """The points on disk."""
        return [point for path in self.files(POINTS) for point in _read(path)]

    def files(self, *endings: str) -> list[Path]:
        """The files that wait, the oldest first; of all kinds, or with one of the endings."""
        return sorted(p for p in self.folder.glob(f"{self.run_id}.*") if p.suffix in (endings or (POINTS, IMAGE)))

    def deliver(self, patience: float = 0.0) -> bool:
        """Send everything, without waiting for a server longer than `patience` seconds; whether nothing is left.

        With no patience nothing is tried during the pause after a failure. Files of a run that was deleted, and images
        that are too large for the server, go to `home/outbox/refused`.
        """
        from filelock import FileLock, Timeout
        from mlflow.exceptions import MlflowException

        self.reason = ""
        if not self.files():
            return True
        if not patience and time.monotonic() < self.next_try:
            return False
        try:
            with FileLock(self.folder / f"{self.run_id}.lock", timeout=patience):
                self._send(self.store.with_patience(patience))
        except Timeout:  # another process sends them
            return False
        except MlflowException as error:
            self.reason = "MLflow's server does not answer" if remote.is_unreachable(error) else _first_line(error)
            self.pause = min(max(FIRST_PAUSE, 2 * self.pause), LONGEST_PAUSE)
            self.next_try = time.monotonic() + self.pause
            return False
        self.pause, self.next_try = 0.0, 0.0
        return not self.files()

    def _send(self, store: Store) -> None:
        """Send the points, then each image. MlflowException for the first that fails; it and later ones stay."""
        if batches := self.files(POINTS):
            with self._removing(store, batches):
                store.log_points(self.run_id, [point for path in batches for point in _read(path)])
        for path in self.files(IMAGE):
            with self._removing(store, [path]):
                self._send_image(store, path)

    def _send_image(self, store: Store, path: Path) -> None:
        """Send an image, unless a process sent it that was killed before it could remove the file. MlflowException."""
        from mlflow.exceptions import MlflowException
        from PIL import Image

        with Image.open(path) as image:
            image.load()
            key, step, moment = image.info["key"], int(image.info["step"]), float(image.info["time"])
            try:
                if not remote.has_image(store.client, self.run_id, step, moment):
                    store.log_image(self.run_id, key, image, step, moment)
            except MlflowException:
                raise
            except Exception as error:  # of the storage of artifacts, which may be any library's
                raise MlflowException(f"{type(error).__name__}: {error}") from error

    @contextmanager
    def _removing(self, store: Store, paths: Sequence[Path]) -> Iterator[None]:
        """Context that sends files: they are removed after it, or set aside where they can never be sent."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            if (reason := remote.refusal(store.client, self.run_id, error)) is None:
                raise
            self._set_aside(paths, reason)
        else:
            for path in paths:
                path.unlink(missing_ok=True)

    def _set_aside(self, paths: Sequence[Path], reason: str) -> None:
        """Move files to the folder of refused ones; the first time for a run with a line on stderr."""
        folder = self.folder / "refused"
        first = not any(folder.glob(f"{self.run_id}.*"))
        folder.mkdir(exist_ok=True)
        for path in paths:
            path.replace(folder / path.name)
        if first:
            print(f"sana-lab: run {self.run_id}: {reason}; what waited for it is kept in {folder}", file=sys.stderr)

    def _new_path(self, ending: str) -> Path:
        return self.folder / f"{self.run_id}.{time.time_ns()}-{os.getpid()}{ending}"


def deliver_all(store: Store) -> int:
    """Send what earlier processes could not; the number of runs of which something is left, for each a line why."""
    if store.server is None:
        return 0
    left = 0
    files = (path for path in (store.home / "outbox").glob("*.*") if path.suffix in (POINTS, IMAGE))
    for run in sorted({path.name.partition(".")[0] for path in files} - {""}):
        outbox = Outbox(store, run)
        if not outbox.deliver():
            left += 1
            print(f"sana-lab: run {run}: {outbox.reason or 'another process sends what waits'}", file=sys.stderr)
    return left


def _read(path: Path) -> list[Point]:
    """The points of a file; a last line that was cut short is left out. Empty if another process has sent the file."""
    with suppress(FileNotFoundError):
        return [Point(*json.loads(line)) for line in path.read_text().split("\n")[:-1]]
    return []


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
