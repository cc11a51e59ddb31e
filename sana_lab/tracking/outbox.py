"""Points of curves on their way to a server: on disk until it has them.

A point is sent with its own time, and MLflow stores equal points once, so sending again duplicates nothing.
"""

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sana_lab.tracking.remote import PatientClient, is_unreachable
from sana_lab.tracking.store import Point, Store

if TYPE_CHECKING:
    from pathlib import Path


class Outbox:
    """The points of one run that a server does not have yet: `home/outbox/RUN.jsonl`."""

    def __init__(self, store: Store, run_id: str) -> None:
        self.store, self.run_id = store, run_id
        self.path: Path = store.home / "outbox" / f"{run_id}.jsonl"

    def add(self, points: Sequence[Point]) -> None:
        """Write points to disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.writelines(json.dumps(point) + "\n" for point in points)
            file.flush()
            os.fsync(file.fileno())

    def points(self) -> list[Point]:
        """The points on disk; a last line that was cut short by a kill is left out."""
        lines = self.path.read_text().split("\n")[:-1] if self.path.exists() else []
        return [Point(*json.loads(line)) for line in lines]

    def deliver(self, patience: float = 0.0) -> bool:
        """Send all points, without waiting for a server longer than `patience` seconds; whether none is left."""
        from mlflow.exceptions import MlflowException

        points = self.points()
        try:
            if points:
                client = self.store.client
                inner = client.inner if isinstance(client, PatientClient) else client
                self.store.log_points(self.run_id, points, PatientClient(inner, patience))
        except MlflowException as error:
            if not is_unreachable(error):
                raise
            return False
        self.path.unlink(missing_ok=True)
        return True


def deliver_all(store: Store) -> int:
    """Send what earlier processes could not; the number of runs whose points are left."""
    if store.server is None:
        return 0
    runs = [path.stem for path in sorted((store.home / "outbox").glob("*.jsonl"))]
    return sum(not Outbox(store, run).deliver() for run in runs)
