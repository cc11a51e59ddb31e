"""The verbs `ablate` and `table` of an efficiency table: its rows are counted, timed and recorded in MLflow.

A row is known by the hash of everything in it, options that change speed alone (`backend`) included, and by the device:
what another machine has timed is timed again.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from sana_lab import environment
from sana_lab.ablation import efficiency_table
from sana_lab.ablation.efficiency_spec import Speed, is_speed, load, probe_of
from sana_lab.ablation.runner import alone, parent_run, sweep_name
from sana_lab.ablation.trials import Item, runs_by_key
from sana_lab.bench.probes import How
from sana_lab.bench.record import device_name
from sana_lab.checkpoints import weights
from sana_lab.config.paths import check_folder
from sana_lab.config.schema import Trial
from sana_lab.costs.out_of_memory import is_out_of_memory, release
from sana_lab.tracking.store import Store

__all__ = ["is_speed", "load", "main", "run", "write"]

UNMEASURED = "sana.unmeasured"
"""Tag of a run that was counted and could not be timed: why."""


def main(recipe: str, overrides: Sequence[str], dry_run: bool, out: Path | None, scale: str | None = None) -> int:
    """`sana-lab ablate` of an efficiency table: what is missing, row by row; the exit status is 1 where one failed."""
    table, trials = load(recipe, overrides, scale)
    store, name, on = Store(weights.HOME), sweep_name(recipe, scale, overrides), timed_on(table)
    if dry_run:
        print(f"{table.title}: {len(trials)} rows, {_plan(on)}")
        print("\n".join(map(_line, found(store, name, trials, on))))
        return 0
    check_folder(weights.HOME)
    check_folder(out or weights.HOME / "tables" / name)
    with alone(name):
        run(store, name, table, trials, on)
    write(recipe, overrides, out, scale)
    return 0 if all(i.done for i in found(store, name, trials, on)) else 1


def write(recipe: str, overrides: Sequence[str], out: Path | None, scale: str | None = None) -> None:
    """Table and plot of the rows that have been run on a machine such as this."""
    table, trials = load(recipe, overrides, scale)
    store, name, on = Store(weights.HOME), sweep_name(recipe, scale, overrides), timed_on(table)
    folder = out or weights.HOME / "tables" / name
    check_folder(folder)
    items = found(store, name, trials, on)
    reasons = {i.trial.label: i.run.tags[UNMEASURED] for i in items if i.run and UNMEASURED in i.run.tags}
    efficiency_table.write(
        table, items, efficiency_table.Conditions(device_name(on) if on else None, _dtypes(trials), reasons), folder
    )


def timed_on(table: Speed) -> torch.device | None:
    """The device that rows are timed on; None where they are counted alone."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return None if table.gpu else torch.device("cpu")


def found(store: Store, name: str, trials: Sequence[Trial], on: torch.device | None) -> list[Item]:
    """Each row with its newest run on that device, a finished one first."""
    runs = runs_by_key(store, name)
    return [Item(t, key, key, runs.get(key)) for t in trials for key in [row_hash(t, on)]]


def row_hash(trial: Trial, on: torch.device | None) -> str:
    """The name of a finished row: everything that its options say, and the device that timed it, if one did."""
    told = {"row": trial.experiment, "on": device_name(on) if on else None}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def run(store: Store, name: str, table: Speed, trials: Sequence[Trial], on: torch.device | None) -> None:
    """The rows that are missing, one after the other, so that nothing else of ours is on the machine."""
    todo = list({i.key: i for i in found(store, name, trials, on) if not i.done}.values())
    if not todo:
        print(f"{name}: all {len(trials)} rows are done")
        return
    store.create(name)
    parent = parent_run(store, name, table.title)
    for n, item in enumerate(todo, 1):
        print(f"{name}: row {n} of {len(todo)}, {item.trial.label}", flush=True)
        _guarded(store, _start(store, name, parent, item), item.trial, on)
    store.finish(parent, "FINISHED" if all(i.done for i in found(store, name, trials, on)) else "FAILED")


def probe_row(trial: Trial, on: torch.device | None) -> tuple[dict[str, float], str | None]:
    """What a row costs, and why it was not timed where it should have been: it does not fit the memory."""
    probe = probe_of(trial)
    counted = probe.count()
    if on is None:
        return counted, None
    how = How(on, trial.experiment["repeats"], trial.experiment["warmup"])
    try:
        return {**counted, **probe.measure(how)}, None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return counted, f"out of memory: {next(iter(str(error).splitlines()), type(error).__name__)}"
    finally:
        release()


def _guarded(store: Store, run: str, trial: Trial, on: torch.device | None) -> None:
    """Where a row fails, its run keeps the error, and others go on."""
    try:
        metrics, why = probe_row(trial, on)
    except Exception as error:
        store.set_tags(run, {"sana.error": f"{type(error).__name__}: {error}"})
        store.finish(run, "FAILED")
    except BaseException:
        store.finish(run, "KILLED")
        raise
    else:
        store.log_metrics(run, metrics)
        store.set_tags(run, {UNMEASURED: why} if why else {})
        store.finish(run)


def _dtypes(trials: Sequence[Trial]) -> list[str]:
    return sorted({probe_of(t).dtype for t in trials})


def _start(store: Store, name: str, parent: str, item: Item) -> str:
    """The row's run, the one that failed or was interrupted where there is one."""
    if item.run is not None:
        store.resume(item.run.id)
        return item.run.id
    tags = {"sana.kind": "trial", "sana.sweep": name, "sana.trial": item.key, "sana.label": item.trial.label}
    labels = {f"label.{axis}": label for axis, label in item.trial.labels.items()}
    run = store.start_run(name, item.trial.label, {**tags, **labels, **environment.environment()}, parent)
    store.log_params(run, item.trial.experiment)
    return run


def _plan(on: torch.device | None) -> str:
    return f"timed on {device_name(on)}" if on else "counted alone, for there is no CUDA device"


def _line(item: Item) -> str:
    state = "done" if item.done else "failed" if item.run and item.run.status == "FAILED" else "to run"
    return f"  {item.key}  {item.trial.label:<40} {state}"
