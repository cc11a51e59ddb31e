"""Lightning's logger on a `Store`: curves and images of one run."""

import time
import warnings
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from sana_lab.tracking.store import Point, Store

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor


class Tracker(Logger):
    """Writes what a LightningModule logs to one run; who started the run names its configuration and ends it.

    Points are written every `seconds`, since a write to sqlite takes 10 to 25 ms; a process killed with SIGKILL loses
    that much of its curves and no more. Without a run it writes nothing.
    """

    def __init__(self, store: Store | None = None, run_id: str | None = None, *, seconds: float = 10.0) -> None:
        super().__init__()
        if (store is None) != (run_id is None):
            raise ValueError(f"a tracker takes a store and a run of it, or neither; got store={store}, run_id={run_id}")
        self.store, self.run_id, self.seconds = store, run_id, seconds
        self.waiting: list[Point] = []
        self.written = time.monotonic()  # when a write was last tried

    @property
    def name(self) -> str:
        return "sana_lab"

    @property
    def version(self) -> str:
        return self.run_id or ""

    @property
    def save_dir(self) -> str | None:
        return None if self.store is None else str(Path(self.store.home))

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any) -> None:
        """Nothing: the run holds the resolved experiment already."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        now = time.time()
        self.waiting += [Point(key, float(value), step or 0, now) for key, value in metrics.items() if key != "epoch"]
        if time.monotonic() - self.written >= self.seconds:
            self._try_flush()

    @rank_zero_only
    def log_image(self, key: str, image: "Image | Tensor | np.ndarray", step: int = 0) -> None:
        """An image as `Store.log_image` takes it."""
        if self.store and self.run_id:
            self.store.log_image(self.run_id, key, image, step)

    def flush(self) -> None:
        """Writes the waiting points; they go on waiting if that fails."""
        self.written = time.monotonic()
        if self.store and self.run_id and self.waiting:
            self.store.log_points(self.run_id, self.waiting)
        self.waiting = []

    def _try_flush(self) -> None:
        """A busy database or a full disk is no reason to stop training: the next write, or the last, tells."""
        from mlflow.exceptions import MlflowException

        try:
            self.flush()
        except MlflowException as error:
            warnings.warn(f"{len(self.waiting)} points of curves wait, MLflow did not take them: {error}", stacklevel=2)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.flush()
