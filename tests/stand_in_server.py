"""A stand-in for an MLflow server: its client is that of a database here, and can be made to find no server."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from sana_lab.tracking import database, remote
from sana_lab.tracking.store import Store

ADDRESS = "http://127.0.0.1:9"


class Server:
    """MLflow's client as of a server. While `away`, each call fails at once as one that a server does not answer."""

    def __init__(self, path: Path) -> None:
        self.inner, self.away = database.client(path), False
        self.failures = 0  # calls that were not answered
        self.calls: list[str] = []  # names of the methods that were

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.inner, name)
        if not callable(value):
            return value
        return lambda *arguments, **options: self.call(name, value, *arguments, **options)

    def call(self, name: str, method: Any, /, *arguments: Any, **options: Any) -> Any:
        if self.away:
            self.failures += 1
            raise MlflowException(f"API request to {ADDRESS}/{name} failed with exception: timed out")
        self.calls.append(name)
        return method(*arguments, **options)

    def store(self, home: Path | str = "runs") -> Store:
        """The store of a folder that records on this server."""
        return Store(home)

    def points(self, run: str, key: str) -> list[tuple[int, float]]:
        """(step, value) of every point of a curve, also of those that were written twice."""
        return [(m.step, m.value) for m in self.inner.get_metric_history(run, key)]

    def images(self, run: str) -> list[str]:
        """Key and step of every image of a run, such as "samples 4", in order."""
        names = (Path(file.path) for file in self.inner.list_artifacts(run, "images"))
        parts = [name.stem.split("+") for name in names if name.suffix == ".png"]
        return sorted(f"{part[0]} {part[2]}" for part in parts)


def start(folder: Path, empty_database: Path, patch: pytest.MonkeyPatch) -> Server:
    """A server of this test, which the environment names; calls are not tried again, unless it is asked for."""
    shutil.copy(empty_database, folder / "server.db")
    server = Server(folder / "server.db")
    patch.setenv(remote.VARIABLE, ADDRESS)
    patch.setattr(remote, "client", lambda location: remote.PatientClient(server, 0.0))  # type: ignore[arg-type]
    return server
