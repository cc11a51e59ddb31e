"""The MLflow run that records a training from the verb, across interruptions."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.loggers import Logger

from sana_lab import environment
from sana_lab.config import hashing, interpolation
from sana_lab.config.atomic_write import explaining_full_disk
from sana_lab.config.schema import Config
from sana_lab.costs.out_of_memory import first_line
from sana_lab.tracking.logger import RunLogger
from sana_lab.tracking.store import Store
from sana_lab.training import parent, ranks


@contextmanager
def recorded(store: Store, experiment: Config, name: str) -> Iterator[Logger | None]:
    """The logger of the first rank, on the run that the model's training began, or on a new one."""
    if not ranks.is_first():
        yield None
        return
    with explaining_full_disk(store.database):
        run = _run(store, experiment, name)
    tracker = RunLogger(store, run)
    try:
        yield tracker
        with explaining_full_disk(store.database):
            tracker.finalize("success")
            store.finish(run)
    except BaseException as error:
        with suppress_storage_errors():
            tracker.finalize("failed")
            store.set_tags(run, {"sana.error": f"{type(error).__name__}: {error}"})
            store.finish(run, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise


def _run(store: Store, experiment: Config, name: str) -> str:
    """The id of the model's newest run that is not finished, resumed, or of a new run."""
    model = {"sana.model": hashing.experiment_hash(experiment)}
    ancestry = parent.tags(experiment)
    store.create("training")
    run = next((r.id for r in store.find("training", model) if r.status != "FINISHED"), None)
    if run is None:
        run = store.start_run("training", name, {**model, **ancestry, **environment.environment()})
    else:
        store.resume(run)
        store.set_tags(run, {"sana.error": "", **environment.environment()})
    store.log_params(run, interpolation.as_written(experiment))
    return run


@contextmanager
def suppress_storage_errors() -> Iterator[None]:
    """Warn where a failure cannot be recorded, so that it is not hidden by the one of the record.

    MLflow's own log of the failed write, a traceback over a hundred lines, is left out.
    """
    from mlflow.exceptions import MlflowException

    log = logging.getLogger("mlflow.store.db.utils")
    before = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    except (MlflowException, OSError) as error:
        warnings.warn(f"the run keeps its status, as MLflow cannot write: {first_line(error)}", stacklevel=3)
    finally:
        log.setLevel(before)
