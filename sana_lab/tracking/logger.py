"""Lightning's MLFlowLogger on one run of a `Store`."""

import time
import warnings
from argparse import Namespace
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities import rank_zero_only

from sana_lab.tracking.outbox import Outbox
from sana_lab.tracking.remote import PATIENCE
from sana_lab.tracking.store import Point, Store

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor


class RunLogger(MLFlowLogger):
    """Log curves and images of a LightningModule to a run that the caller starts, configures and ends.

    Differences from Lightning's logger: points are buffered and written in one transaction every `seconds`, because a
    write to sqlite takes 10 to 25 ms (SIGKILL loses at most the buffered points); points that the database refuses are
    retried with the next write; images are supported; `finalize` leaves the run open; `log_hyperparams` does nothing.
    """

    def __init__(self, store: Store, run_id: str, *, seconds: float = 10.0) -> None:
        _ = store.client  # imports MLflow with its telemetry off
        super().__init__(tracking_uri=store.uri, run_id=run_id)
        self.store, self.seconds = store, seconds
        self.waiting: list[Point] = []
        self.written = time.monotonic()  # when a write was last tried
        self.outbox = None if store.server is None else Outbox(store, run_id)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any) -> None:
        """Do nothing: the run already has the resolved experiment."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        now = time.time()
        self.waiting += [Point(key, float(value), step or 0, now) for key, value in metrics.items() if key != "epoch"]
        if time.monotonic() - self.written >= self.seconds:
            self.try_flush()

    @rank_zero_only
    def log_image(self, key: str, image: "Image | Tensor | np.ndarray", step: int = 0) -> None:
        """Log an image; types as in `Store.log_image`."""
        assert self._run_id is not None
        self.store.log_image(self._run_id, key, image, step)

    def flush(self) -> None:
        """Write the buffered points; keep them if that fails, those for a server on disk."""
        if self.outbox is not None:
            self._send(self.outbox)
            return
        self.written = time.monotonic()
        if self.waiting:
            assert self._run_id is not None
            self.store.log_points(self._run_id, self.waiting)
        self.waiting = []

    def _send(self, outbox: Outbox, patience: float = 0.0) -> None:
        """Put the points to disk, and from there to the server if it answers."""
        points, self.waiting = self.waiting, []
        outbox.add(points)
        if not outbox.deliver(patience):
            warnings.warn(f"MLflow's server does not answer; points wait in {outbox.path}", stacklevel=3)
        self.written = time.monotonic()

    @rank_zero_only
    def try_flush(self) -> None:
        """Write without stopping the training on a busy database or a full disk; only the final write raises."""
        from mlflow.exceptions import MlflowException

        try:
            self.flush()
        except MlflowException as error:
            first_line = next(iter(str(error).splitlines()), "")
            warnings.warn(
                f"{len(self.waiting)} points of curves wait, MLflow did not take them: {first_line}", stacklevel=2
            )

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Write the waiting points; after a failure without an error that would hide its cause."""
        if self.outbox is not None:
            self._send(self.outbox, PATIENCE if status == "success" else 0.0)
        else:
            self.flush() if status == "success" else self.try_flush()

    def __reduce__(self) -> tuple[Any, ...]:
        """As it was made, for another process."""
        return type(self), (self.store, self._run_id)
