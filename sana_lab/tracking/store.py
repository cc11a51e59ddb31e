"""Runs in MLflow: one sqlite file and one folder of artifacts under a home directory, or where the variable
`MLFLOW_TRACKING_URI` says: a server, or a database elsewhere.

MLflow is imported where it is used (it takes two seconds). Every call names its run: there is no active run and no
global state; a `Store` may be used from several threads, and a home by several processes.
"""

import copy
import functools
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from sana_lab.tracking import database, remote

if TYPE_CHECKING:
    import numpy as np
    from filelock import FileLock
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun
    from PIL.Image import Image
    from torch import Tensor

T = TypeVar("T")

PARENT, SOURCE = "mlflow.parentRunId", "mlflow.source.name"
STATUSES = ("RUNNING", "FINISHED", "FAILED", "KILLED")
IGNORED = ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID")
"""Variables of MLflow that name another experiment or run."""

MAX_PARAM = 500  # characters of a parameter in the table of runs; config/resolved.yaml holds the whole

CONFIG = "config/resolved.yaml"
"""Artifact with the whole configuration of a run."""

MAX_TAG = 8000  # characters of a tag, and so of a run's description; MLflow cuts longer ones


class Run(NamedTuple):
    """MLflow's record of one run; metrics are the last values."""

    id: str
    name: str
    status: str  # RUNNING, FINISHED, FAILED or KILLED; RUNNING too when the process was killed with SIGKILL
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float]
    started: float  # seconds since 1970
    ended: float | None
    experiment: str  # its id
    parent: str | None


class Point(NamedTuple):
    """One value of one curve."""

    key: str
    value: float
    step: int
    time: float  # seconds since 1970


class Store:
    """The runs under `home`: `home/mlflow.db` and `home/artifacts`.

    It may be used by several processes and threads at once; a file lock protects the creation of the database. The
    absolute artifact locations that MLflow stores are updated after a home was moved or copied.
    """

    def __init__(self, home: Path | str, *, local: bool = False) -> None:
        """`local` is the database of `home`, wherever the variable says that runs are."""
        self.home = Path(home).expanduser().absolute()
        self.server = None if local else remote.address()  # of MLflow's server; None for a database
        elsewhere = None if local else database.elsewhere(os.environ.get(remote.VARIABLE, ""))
        self.database = elsewhere or self.home / "mlflow.db"
        self.artifacts = self.database.parent / "artifacts"
        self.moves = elsewhere is None  # whether artifacts move with the folder
        self.uri = self.server or database.url(self.database)

    @functools.cached_property
    def client(self) -> "MlflowClient":
        """MLflow's client; the database is created if missing. ValueError for a file that is not MLflow's."""
        say_what_is_ignored(self.uri)
        if self.server is not None:
            client: MlflowClient = remote.client(self.server)
            return client
        self.make_database()
        database.check(self.database)
        if self.moves:
            database.relocate(self.database, self.artifacts)
        return database.client(self.database)

    def with_patience(self, seconds: float) -> "Store":
        """The same runs, with calls that are tried again for so many seconds where a server does not answer."""
        if self.server is None:
            return self
        client, other = self.client, copy.copy(self)
        inner = client.inner if isinstance(client, remote.PatientClient) else client
        other.__dict__["client"] = remote.PatientClient(inner, seconds)
        return other

    @functools.cached_property
    def _lock(self) -> "FileLock":
        from filelock import FileLock

        return FileLock(self.home / "mlflow.lock")

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("client", "_lock")}

    def create(self, experiment: str) -> str:
        """The id of `experiment`, which is created (with the database) or restored if it was deleted.

        ValueError if `home` cannot be written.
        """
        client = self.client
        if self.server is not None:
            return remote.make_experiment(client, experiment)
        with self._writing():
            return self._make_experiment(client, experiment)

    def make_database(self) -> None:
        """Create the database if missing. ValueError if `home` cannot be written."""
        if not database.exists(self.database):
            with self._writing():
                if not database.exists(self.database):  # another process may have made it
                    database.make(self.database)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Context that holds the lock of the home. ValueError if the home cannot be written."""
        try:
            self.artifacts.mkdir(parents=True, exist_ok=True)
            with self._lock:
                yield
        except OSError as error:
            raise ValueError(f"cannot write runs under {self.home}: {error}; choose a folder you can write") from error

    def _make_experiment(self, client: "MlflowClient", experiment: str) -> str:
        existing = client.get_experiment_by_name(experiment)
        if existing is None:
            return client.create_experiment(experiment, artifact_location=self.artifacts.as_uri())
        if existing.lifecycle_stage == "deleted":
            client.restore_experiment(existing.experiment_id)
        return str(existing.experiment_id)

    def experiments(self) -> dict[str, str]:
        """Name -> id of every experiment that `create` made here, newest first."""
        if self.is_empty():
            return {}
        experiments = self.client.search_experiments(order_by=["last_update_time DESC"])
        return {
            e.name: e.experiment_id
            for e in experiments
            if self.server or e.artifact_location == self.artifacts.as_uri()
        }

    def is_empty(self) -> bool:
        """Whether no database has been made yet; a server has one."""
        return self.server is None and not database.exists(self.database)

    def start_run(
        self, experiment: str, name: str, tags: Mapping[str, object] | None = None, parent: str | None = None
    ) -> str:
        """The id of a new run that is RUNNING; `parent` is the id of the sweep's run."""
        all_tags = {SOURCE: "sana-lab"} | ({PARENT: parent} if parent else {}) | _strings(tags or {})
        identity = self.create(experiment)
        run = self.client.create_run(identity, run_name=name, tags=all_tags)
        return str(run.info.run_id)

    def resume(self, run_id: str) -> None:
        """Mark a run that had ended, or was killed, as RUNNING again."""
        self.client.update_run(run_id, status="RUNNING")

    def finish(self, run_id: str, status: str = "FINISHED") -> None:
        """End a run as FINISHED, FAILED or KILLED (any case)."""
        if status.upper() not in STATUSES[1:]:
            raise ValueError(f"status {status!r} is not one of {', '.join(STATUSES[1:])}")
        self.client.set_terminated(run_id, status=status.upper())

    def delete_run(self, run_id: str) -> None:
        """Remove a run from the database for good, as `mlflow gc` does; its artifacts stay. A server hides the run
        until its own `mlflow gc`."""
        self.client.delete_run(run_id)
        if self.server is None:
            self.client._tracking_client.store._hard_delete_run(run_id)

    def delete(self, experiment: str) -> None:
        """Remove an experiment and all its runs, as `delete_run` does."""
        existing = self.client.get_experiment_by_name(experiment)
        assert existing is not None
        if self.server is not None:  # under another name, since whoever restores an experiment restores its runs
            self.client.rename_experiment(existing.experiment_id, f"{experiment} (removed {existing.experiment_id})")
            self.client.delete_experiment(existing.experiment_id)
            return
        for run in self.summaries(experiment):
            self.delete_run(run.id)
        self.client.delete_experiment(existing.experiment_id)
        self.client._tracking_client.store._hard_delete_experiment(existing.experiment_id)

    def set_times(self, run_id: str, started: float, ended: float | None = None) -> None:
        """Set when a run started and, if given, ended, in seconds since 1970; a server keeps its own times."""
        if self.server is not None:
            return
        _ = self.client  # checks the database
        database.set_times(self.database, run_id, started, ended)

    def rename(self, run_id: str, name: str) -> None:
        """Change a run's name."""
        self.client.update_run(run_id, name=name)

    def replace_params(self, run_id: str, prefix: str, params: Mapping[str, object]) -> None:
        """Replace the parameters whose keys begin with `prefix` by these, which a log never does.

        On a server new keys are added, and others stay.
        """
        if self.server is not None:
            self.log_params(run_id, {}, params)
            return
        _ = self.client
        database.replace_params(
            self.database, run_id, prefix, {clean(k): _short(v) for k, v in _strings(params).items()}
        )

    def set_tags(self, run_id: str, tags: Mapping[str, object]) -> None:
        from mlflow.entities import RunTag

        for chunk in _chunks([RunTag(k, v) for k, v in _strings(tags).items()], 100):
            self.client.log_batch(run_id, tags=chunk)

    def log_params(
        self, run_id: str, config: Mapping[str, Any], params: Mapping[str, object] | None = None
    ) -> dict[str, tuple[str, str]]:
        """Write nested plain data as the artifact config/resolved.yaml, and as flat parameters, or `params` in their
        place.

        A parameter never changes once written: on resume only new keys are added, and those that differ are returned
        as {key: (value in the run, new value)}.
        """
        from mlflow.entities import Param

        flat = flatten(config) if params is None else _strings(params)
        texts = {clean(k): _short(v) for k, v in flat.items()}
        written = self.client.get_run(run_id).data.params
        for chunk in _chunks([Param(k, v) for k, v in texts.items() if k not in written], 100):
            self.client.log_batch(run_id, params=chunk)
        if config and not written:
            self.log_dict(run_id, config, CONFIG)
        return {k: (written[k], v) for k, v in texts.items() if k in written and written[k] != v}

    def log_metrics(self, run_id: str, metrics: Mapping[str, Any], step: int = 0) -> None:
        """Write numbers, or tensors of one element, at `step`; None is left out."""
        now = time.time()
        self.log_points(run_id, [Point(k, float(v), step, now) for k, v in metrics.items() if v is not None])

    def log_points(self, run_id: str, points: Iterable[Point]) -> None:
        """Write points of curves, a thousand to a transaction."""
        from mlflow.entities import Metric

        metrics = [Metric(clean(p.key), p.value, int(p.time * 1000), p.step) for p in points]
        for chunk in _chunks(metrics, 1000):
            self.client.log_batch(run_id, metrics=chunk)

    def log_image(
        self, run_id: str, key: str, image: "Image | Tensor | np.ndarray", step: int = 0, moment: float | None = None
    ) -> None:
        """Write a PNG that the UI shows with a slider over steps; arrays as in `to_pil`, its time in seconds since
        1970."""
        stamp = None if moment is None else round(1000 * moment)
        self.client.log_image(run_id, to_pil(image), key=clean(key), step=step, timestamp=stamp, synchronous=True)

    def log_dict(self, run_id: str, data: Mapping[str, Any], file: str) -> None:
        """Write plain data as YAML or JSON, by the ending of `file`."""
        self.client.log_dict(run_id, dict(data), file)

    def log_file(self, run_id: str, path: Path | str, folder: str | None = None) -> None:
        """Copy a file, or the files of a folder, to the run's artifacts, or to `folder` among them."""
        log = self.client.log_artifacts if Path(path).is_dir() else self.client.log_artifact
        log(run_id, str(path), folder)

    def file(self, run_id: str, name: str = "") -> Path:
        """The path of a run's artifact on disk, where a server's is copied to. FileNotFoundError if missing."""
        if self.server is not None:
            return remote.download(self.client, run_id, name, self.home / "downloads")
        path = self.artifacts / run_id / "artifacts" / name
        if not path.exists():
            raise FileNotFoundError(f"run {run_id} has no artifact {name!r} ({path})")
        return path

    def history(self, run_id: str, key: str) -> list[tuple[int, float]]:
        """The curve of a metric as (step, value), by step; the last value if a resumed run repeated a step."""
        points = self.client.get_metric_history(run_id, clean(key))
        latest = {m.step: _number(m.value) for m in sorted(points, key=lambda m: m.timestamp)}
        return sorted(latest.items())

    def find(self, experiment: str, tags: Mapping[str, object] | None = None) -> list[Run]:
        """The runs of an experiment that carry all these tags, newest first; empty if there is no such experiment."""
        if self.is_empty():
            return []
        existing = self.client.get_experiment_by_name(experiment)
        return [] if existing is None else list(self._search([existing.experiment_id], _strings(tags or {})))

    def summaries(self, experiment: str) -> list[Run]:
        """The runs of an experiment, newest first, a thousand of them in a second."""
        if self.is_empty():
            return []
        if self.server is not None:
            return self.find(experiment)
        _ = self.client  # checks the database
        return [_summary(row) for row in database.runs(self.database, experiment)]

    def all_runs(self, experiment: str) -> list[Run]:
        """Every run of the experiment with this id, newest first."""
        return list(self._search([experiment], {}))

    def recorded(self) -> list[tuple[str, Run]]:
        """(experiment, run) of every run that the lab recorded, newest first."""
        if not (names := {id_: name for name, id_ in self.experiments().items()}):
            return []
        return [(names[run.experiment], run) for run in self._search(list(names), {SOURCE: "sana-lab"})]

    def run(self, run_id: str) -> Run:
        return _record(self.client.get_run(run_id))

    def _search(self, experiments: list[str], tags: dict[str, str]) -> Iterator[Run]:
        query = " and ".join(f"tags.`{k}` = {_quoted(v)}" for k, v in tags.items())
        token = None
        while True:
            page = self.client.search_runs(experiments, query, page_token=token)
            yield from map(_record, page)
            token = page.token
            if not token:
                return


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested plain data -> {"a.b": text}; strings unchanged, other leaves as JSON."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def artifact_link(experiment: str, run_id: str, file: str) -> str:
    """The address of an artifact's page, relative to that of MLflow's server."""
    return f"#/experiments/{experiment}/runs/{run_id}/artifacts/{file}"


def clean(key: str) -> str:
    """A metric, parameter or image key as MLflow allows it; other characters become "_"."""
    return re.sub(r"[^A-Za-z0-9_\-./ ]", "_", key)


def to_pil(image: "Image | Tensor | np.ndarray") -> "Image":
    """A PIL image from one, or from uint8 (3, H, W) or (H, W, 3). ValueError for other shapes and types."""
    import numpy as np
    from PIL.Image import Image, fromarray

    if isinstance(image, Image):
        return image
    array = image if isinstance(image, np.ndarray) else image.cpu().numpy()
    last = array.transpose(1, 2, 0) if array.ndim == 3 and array.shape[0] == 3 else array
    if last.ndim != 3 or last.shape[2] != 3 or last.dtype != np.uint8:
        raise ValueError(f"an image is uint8 (3, H, W) or (H, W, 3), not {array.dtype} {tuple(array.shape)}")
    return fromarray(np.ascontiguousarray(last))


@functools.cache
def say_what_is_ignored(place: str) -> None:
    """Name, on stderr, the variables of MLflow that the lab does not follow."""
    for name in IGNORED:
        if value := os.environ.get(name):
            print(f"sana-lab: {name}={value} is ignored: runs are recorded in {place}", file=sys.stderr, flush=True)


def _record(run: "MlflowRun") -> Run:
    info, data = run.info, run.data
    ended = info.end_time / 1000 if info.end_time and info.status != "RUNNING" else None
    metrics = {k: _number(v) for k, v in data.metrics.items() if not math.isnan(v)}
    times = (info.start_time / 1000, ended)
    parent = data.tags.get(PARENT)
    return Run(
        info.run_id, info.run_name, info.status, data.tags, data.params, metrics, *times, info.experiment_id, parent
    )


def _summary(row: database.Row) -> Run:
    ended = row.ended / 1000 if row.ended and row.status != "RUNNING" else None
    metrics = {k: _number(v) for k, v in row.metrics.items()}
    times = (row.started / 1000, ended)
    return Run(
        row.id, row.name, row.status, row.tags, row.params, metrics, *times, row.experiment, row.tags.get(PARENT)
    )


def _number(value: float) -> float:
    """A metric as it was written: MLflow stores infinity as the largest float."""
    return math.copysign(math.inf, value) if abs(value) == sys.float_info.max else value


def _strings(tags: Mapping[str, object]) -> dict[str, str]:
    """Tags as MLflow stores them: strings unchanged, True as "true", None omitted."""
    return {k: v if isinstance(v, str) else json.dumps(v, default=str) for k, v in tags.items() if v is not None}


def _quoted(text: str) -> str:
    """A string literal for MLflow's filters, which have no escapes, in the kind of quotes that it does not contain."""
    if "'" not in text:
        return f"'{text}'"
    if '"' not in text:
        return f'"{text}"'
    raise ValueError(f"cannot search for a tag that contains both kinds of quotes: {text}")


def _short(text: str) -> str:
    return text if len(text) <= MAX_PARAM else text[: MAX_PARAM - 1] + "…"


def _chunks(items: list[T], size: int) -> Iterator[list[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
