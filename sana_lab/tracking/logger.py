"""Lightning's MLFlowLogger on one run of a `Store`."""

import time
import warnings
from argparse import Namespace
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities import rank_zero_only

from sana_lab.tracking.outbox import Outbox
from sana_lab.tracking.remote import PATIENCE
from sana_lab.tracking.store import Point, Store, to_pil

if TYPE_CHECKING:
    import numpy as np
    from mlflow import MlflowClient
    from PIL.Image import Image
    from torch import Tensor


class RunLogger(MLFlowLogger):
    """Log curves and images of a LightningModule to a run that the caller starts, configures and ends.

    Differences from Lightning's logger: points are buffered and written in one transaction every `seconds`, because a
    write to sqlite takes 10 to 25 ms (SIGKILL loses at most the buffered points); points that the database refuses are
    retried with the next write; images are supported; `finalize` leaves the run open; `log_hyperparams` does nothing.
    Points and images for a server wait on disk while it does not answer, and training goes on.
    """

    def __init__(self, store: Store, run_id: str, *, seconds: float = 10.0) -> None:
        _ = store.client  # imports MLflow with its telemetry off
        super().__init__(tracking_uri=store.uri, run_id=run_id)
        self.store, self.seconds = store, seconds
        self.waiting: list[Point] = []
        self.written = time.monotonic()  # when a write was last tried
        self.logged: dict[str, set[int]] = {}  # steps of the curves that `steps` was asked for
        self.outbox = None if store.server is None else Outbox(store, run_id)

    @property
    def experiment(self) -> "MlflowClient":
        """MLflow's client. Lightning's own asks the server for the run first, an error if it does not answer."""
        return self.store.client

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any) -> None:
        """Do nothing: the run already has the resolved experiment."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        now = time.time()
        for key in metrics.keys() & self.logged.keys():
            self.logged[key].add(step or 0)
        self.waiting += [Point(key, float(value), step or 0, now) for key, value in metrics.items() if key != "epoch"]
        if time.monotonic() - self.written >= self.seconds:
            self.try_flush()

    @rank_zero_only
    def log_image(self, key: str, image: "Image | Tensor | np.ndarray", step: int = 0) -> None:
        """Log an image; types as in `Store.log_image`. One for a server is sent with the next write."""
        assert self._run_id is not None
        if self.outbox is None:
            self.store.log_image(self._run_id, key, image, step)
        else:
            self.outbox.add_image(key, to_pil(image), step)

    def steps(self, key: str) -> set[int]:
        """Steps at which a curve has values, those that wait included; while a server does not answer only these."""
        from mlflow.exceptions import MlflowException

        if key not in self.logged:
            assert self._run_id is not None
            waiting = [*self.waiting, *(self.outbox.points() if self.outbox else [])]
            self.logged[key] = {point.step for point in waiting if point.key == key}
            with suppress(MlflowException):
                self.logged[key] |= {step for step, _ in self.store.with_patience(0).history(self._run_id, key)}
        return self.logged[key]

    def flush(self) -> None:
        """Write the buffered points; keep them if that fails, those for a server on disk."""
        self.written = time.monotonic()
        if self.outbox is not None:
            self._send(self.outbox)
            return
        if self.waiting:
            assert self._run_id is not None
            self.store.log_points(self._run_id, self.waiting)
        self.waiting = []

    def _send(self, outbox: Outbox, patience: float = 0.0) -> None:
        """Put the points to disk, and what is there to the server if it answers. OSError where the disk is full."""
        outbox.add(self.waiting)
        self.waiting = []
        if not outbox.deliver(patience) and outbox.reason:
            warnings.warn(f"{outbox.reason}; curves and images wait in {outbox.folder}", stacklevel=3)

    @rank_zero_only
    def try_flush(self) -> None:
        """Write without stopping the training on a busy database or a full disk; only the final write raises."""
        from mlflow.exceptions import MlflowException

        try:
            self.flush()
        except (MlflowException, OSError) as error:
            first_line = next(iter(str(error).splitlines()), "")
            warnings.warn(
                f"{len(self.waiting)} points of curves wait, as they cannot be written: {first_line}", stacklevel=2
            )

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Write the waiting points; after a failure without an error that would hide its cause."""
        if status != "success":
            self.try_flush()
        elif self.outbox is not None:
            self._send(self.outbox, PATIENCE)
        else:
            self.flush()

    def __reduce__(self) -> tuple[Any, ...]:
        """As it was made, for another process."""
        return type(self), (self.store, self._run_id)
