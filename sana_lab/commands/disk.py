"""Commands `du` and `rm`: what the runs take on the disk, and their removal."""

import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from sana_lab.checkpoints.weights import HOME
from sana_lab.commands import model_use
from sana_lab.config.specs import SpecError, nearest
from sana_lab.tracking.store import Run, Store
from sana_lab.tracking.view import CURRENT, STATE

RUN_ID = re.compile(r"[0-9a-f]{6,32}")
"""A run's id in MLflow, or its beginning."""


class Removal(NamedTuple):
    """Something to remove: folders and files, and what else."""

    title: str
    paths: Sequence[Path]
    remove: Callable[[], None] = lambda: None  # of the database

    def do(self) -> None:
        """Remove it from the database, then from the disk."""
        self.remove()
        for path in self.paths:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())


def text(count: int) -> str:
    """Bytes as kB, MB or GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


def usage() -> int:
    """`sana-lab du`: runs by sweep, models and whether something uses them, tables, the rest; always status 0."""
    store = Store(HOME)
    rows = [(f"sweep {name}", sum(map(size, sweep_paths(store, name)))) for name in store.experiments()]
    models, unused = folders(HOME / "models"), set(unused_models(store)[0])
    used = [path for path in models if path not in unused]
    rows += [(f"{len(used)} models in use", sum(map(size, used)))]
    rows += [(f"{len(unused)} unused models (sana-lab rm --models)", sum(map(size, unused)))]
    rows += [("database", sum(size(path) for path in HOME.glob("mlflow.db*")))]
    rest = size(HOME) - sum(count for _, count in rows) if HOME.is_dir() else 0
    rows += [("other files", max(0, rest)), (f"{HOME.absolute()}", size(HOME) if HOME.is_dir() else 0)]
    print("\n".join(f"{text(count):>10}  {name}" for name, count in rows))
    free = shutil.disk_usage(HOME if HOME.is_dir() else Path()).free
    print(f"{text(free):>10}  free on this disk")
    return 0


def remove(targets: Sequence[str], *, models: bool = False, superseded: bool = False, yes: bool = False) -> int:
    """`sana-lab rm`: remove runs, trials, sweeps and unused models, after a question; status 1 if it is answered no.

    A target is a sweep, SWEEP:LABEL for the runs of a row, or a run's id. SpecError for one that does not exist.
    """
    if not targets and not models:
        raise SpecError("nothing to remove; expected a sweep, SWEEP:LABEL, a run's id, or --models")
    store = Store(HOME)
    removals = [each for target in targets for each in removals_of(store, target, superseded)]
    if models:
        unused, lines = unused_models(store)
        removals += [Removal(f"unused model {path.name}", [path]) for path in unused]
        print("".join(f"{line}\n" for line in lines), end="")
    if not removals:
        print("nothing to remove")
        return 0
    total = sum(size(path) for each in removals for path in each.paths)
    print("\n".join(f"{text(sum(map(size, each.paths))):>10}  {each.title}" for each in removals))
    if not yes and not confirmed(f"Remove these {len(removals)}, {text(total)}? [y/N] "):
        print("nothing was removed")
        return 1
    for each in removals:
        each.do()
    print(f"removed {text(total)}")
    if store.server is not None and targets:
        print(f"{store.server} hides the runs; `mlflow gc` on the server removes them and frees their space")
    return 0


def confirmed(question: str) -> bool:
    """Whether the user answers yes; no where nobody can be asked."""
    if not sys.stdin.isatty():
        print(f"{question}\nno terminal to answer; add --yes to remove them")
        return False
    return input(question).strip().lower() in ("y", "yes")


def removals_of(store: Store, target: str, superseded: bool) -> list[Removal]:
    """What a target of `rm` names. SpecError with the nearest name."""
    names = store.experiments()
    sweep, _, label = target.partition(":")
    if target in names:
        runs = [run for run in store.find(target) if run.tags.get(STATE, CURRENT) != CURRENT]
        return [run_removal(store, run) for run in runs] if superseded else [sweep_removal(store, target)]
    if label and sweep in names:
        runs = store.find(sweep, {"sana.kind": "trial"})
        if rows := [run for run in runs if run.tags.get("sana.label") == label]:
            return [run_removal(store, run) for run in rows]
        labels = {run.tags.get("sana.label", run.name) for run in runs}
        raise SpecError(f"sweep {sweep!r} has no row {label!r}; {nearest(label, labels)}")
    if RUN_ID.fullmatch(target):
        ids = [run for name in names for run in store.find(name) if run.id.startswith(target)]
        if len(ids) == 1:
            return [run_removal(store, ids[0])]
        raise SpecError(f"{len(ids)} runs have an id that begins with {target!r}; expected one")
    raise SpecError(f"there is no sweep {target!r}; {nearest(target, names)}")


def run_removal(store: Store, run: Run) -> Removal:
    """A run with its artifacts."""
    title = f"run {run.id[:10]} {run.name} ({run.status.lower()})"
    return Removal(title, run_paths(store, run), lambda: store.delete_run(run.id))


def run_paths(store: Store, run: Run) -> list[Path]:
    """The artifacts of a run on this disk: of a run on a server what was downloaded, and what waits to be sent."""
    if store.server is None:
        return [store.artifacts / run.id]
    return [store.home / "downloads" / run.id, *(store.home / "outbox").glob(f"{run.id}.*")]


def sweep_removal(store: Store, name: str) -> Removal:
    """All runs of a sweep, its tables and logs. Models stay, as other sweeps may use them."""
    count = len(store.summaries(name))
    return Removal(f"sweep {name}: {count} runs, table, logs", sweep_paths(store, name), lambda: store.delete(name))


def sweep_paths(store: Store, name: str) -> list[Path]:
    """The files of a sweep: artifacts of its runs, samples of its trials, logs, tables."""
    runs = store.summaries(name)
    keys = [run.tags["sana.trial"] for run in runs if "sana.trial" in run.tags]
    paths = [path for run in runs for path in run_paths(store, run)]
    paths += [HOME / "sweeps" / key for key in dict.fromkeys(keys)]
    paths += [HOME / "sweeps" / name, HOME / "tables" / name, HOME / f"{name}.sweep.lock"]
    return [path for path in paths if path.exists()]


def unused_models(store: Store) -> tuple[list[Path], list[str]]:
    """Folders of trained models that are of no current trial and of no experiment, and lines on what is not known: what
    may be in use counts as used."""
    models = folders(HOME / "models")
    if not models:
        return [], []
    use = model_use.use(store)
    sweeps = ", ".join(use.elsewhere)
    lines = [f"runs of {sweeps} are elsewhere; models that no run here names may be theirs, and stay"] if sweeps else []
    return [path for path in models if not use.of(path)], lines


def folders(path: Path) -> list[Path]:
    """The folders in a folder."""
    return sorted(each for each in path.iterdir() if each.is_dir()) if path.is_dir() else []
