"""A team's MLflow server as the place of runs: `MLFLOW_TRACKING_URI`, with MLflow's own variables for credentials."""

import functools
import os
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_lab.tracking import database

if TYPE_CHECKING:
    from mlflow import MlflowClient

VARIABLE = "MLFLOW_TRACKING_URI"

REACH = 10
"""Seconds in which a server has to answer before any work."""

PATIENCE = 600.0
"""Seconds in which a call is tried again where the server does not answer."""

PAUSE = 5.0
"""Seconds between two tries."""

SCHEMES = ("http://", "https://", "databricks")


def address() -> str | None:
    """The server that the environment names; None where runs are in a database here. ValueError for a file store."""
    location = os.environ.get(VARIABLE, "")
    if location.startswith(SCHEMES):
        return location
    if location and database.path_of(location) is None:
        raise ValueError(
            f"{VARIABLE} is {location!r}, where MLflow keeps no runs any more; expected http://HOST:PORT of a server, "
            "sqlite:////PATH of a database, or nothing for ./runs"
        )
    return None


def client(location: str) -> Any:
    """MLflow's client of a server, whose calls wait while it does not answer.

    ValueError if it does not answer within REACH seconds, refuses the credentials, or is of another major version.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(REACH))
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # PatientClient tries again, and says so
    from mlflow import MlflowClient

    if location.startswith("http"):
        check(location)
    return PatientClient(MlflowClient(location))


def check(location: str) -> None:
    """ValueError for a server that cannot be used, before any work."""
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    ask = functools.partial(http_request, get_default_host_creds(location), method="GET", max_retries=0)
    try:
        answer = ask(endpoint="/version", timeout=REACH / 2)
        runs = ask(endpoint="/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default", timeout=REACH / 2)
    except MlflowException as error:
        reason = next(iter(str(error).splitlines()), "")
        raise ValueError(f"the MLflow server {location} ({VARIABLE}) cannot be reached: {reason:.200}") from error
    if runs.status_code in (401, 403):
        raise ValueError(
            f"the MLflow server {location} refuses the credentials ({runs.status_code}); expected "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    ours, theirs = metadata.version("mlflow"), answer.text.strip()
    if answer.status_code == 200 and theirs[:1].isdigit() and theirs.partition(".")[0] != ours.partition(".")[0]:
        raise ValueError(
            f"the server {location} runs MLflow {theirs}, and {ours} is installed here; expected one major version"
        )


def make_experiment(client: Any, name: str) -> str:
    """The id of an experiment of a server, which is created, or restored if it was deleted."""
    from mlflow.exceptions import MlflowException

    existing = client.get_experiment_by_name(name)
    if existing is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another process has made it
                raise
            existing = client.get_experiment_by_name(name)
    if existing.lifecycle_stage == "deleted":
        client.restore_experiment(existing.experiment_id)
    return str(existing.experiment_id)


def download(client: Any, run_id: str, name: str, folder: Path) -> Path:
    """A copy of a run's artifact. FileNotFoundError if missing."""
    from mlflow.exceptions import MlflowException

    place = folder / run_id
    place.mkdir(parents=True, exist_ok=True)
    parent = name.rpartition("/")[0]
    listed = [file.path for file in client.list_artifacts(run_id, parent or None)] if name else [""]
    if name not in listed:
        raise FileNotFoundError(f"run {run_id} has no artifact {name!r}")
    try:
        return Path(client.download_artifacts(run_id, name, str(place)))
    except MlflowException as error:
        raise FileNotFoundError(f"artifact {name!r} of run {run_id} cannot be read: {error}") from error


def has_image(client: Any, run_id: str, step: int, moment: float) -> bool:
    """Whether a run has an image of this step and time (seconds since 1970), by the names that MLflow gives images."""
    mark = f"+step+{step}+timestamp+{round(1000 * moment)}+"
    files = [file.path for file in client.list_artifacts(run_id, "images")]
    return any(mark in file and "compressed" in file for file in files)  # the compressed copy is written last


def refusal(client: Any, run_id: str, error: Exception) -> str | None:
    """Why something that failed with this error can never be sent to a run; None if it may be later.

    MlflowException if the server does not answer.
    """
    from mlflow.exceptions import MlflowException

    if is_unreachable(error):
        return None
    if getattr(getattr(error.__cause__, "response", None), "status_code", 0) == 413:
        return "an image is too large for the server (status 413)"
    try:
        deleted = client.get_run(run_id).info.lifecycle_stage == "deleted"
    except MlflowException as failure:
        if is_unreachable(failure):
            raise
        deleted = failure.error_code == "RESOURCE_DOES_NOT_EXIST" and not str(failure).startswith("API request to")
    return "it was deleted on the server" if deleted else None


class PatientClient:
    """MLflow's client; a call that the server does not answer is tried again for PATIENCE seconds."""

    def __init__(self, inner: "MlflowClient", patience: float = PATIENCE) -> None:
        self.inner, self.patience = inner, patience

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.inner, name)
        return functools.partial(self._call, value) if callable(value) else value

    def _call(self, method: Any, *arguments: Any, **options: Any) -> Any:
        from mlflow.exceptions import MlflowException

        end, silent = time.monotonic() + self.patience, True
        while True:
            try:
                return method(*arguments, **options)
            except MlflowException as error:
                if not is_unreachable(error) or time.monotonic() + PAUSE > end:
                    raise
            if silent:
                print(f"sana-lab: MLflow does not answer; waiting up to {self.patience:.0f} s", file=sys.stderr)
            silent = False
            time.sleep(PAUSE)


def is_unreachable(error: BaseException) -> bool:
    """Whether a call failed because the server did not answer, not because it refused."""
    text = str(error)
    return text.startswith("API request to") and ("failed with exception" in text or "timed out" in text)
