"""The verbs `ablate` and `table`: trials of an ablation, run once each, recorded in MLflow, shown as a table.

A trial is known by the hash of what trains, samples and judges it; a run of that hash that has FINISHED is not run
again, a model that another trial trained is not trained again, and a failed trial is a hole with its error.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sana_lab import environment as tracking
from sana_lab.ablation.progress import Bar
from sana_lab.ablation.results import write
from sana_lab.ablation.trials import Item, items
from sana_lab.checkpoints import weights
from sana_lab.config import ablations, experiments, schema
from sana_lab.config.paths import check_folder
from sana_lab.config.schema import Ablation, Trial
from sana_lab.tracking.store import Run, Store
from sana_lab.training import train

JUDGED, BENCHED = 400, 150
"""What judging and benching a trial count for in the progress bar, in training steps."""


def main(
    recipe: str,
    overrides: Sequence[str],
    workers: int | None,
    dry_run: bool,
    out: Path | None,
    scale: str | None = None,
) -> int:
    """Run what is missing of an ablation, then write its table; the exit status is 1 where a trial failed."""
    ablation, trials = ablations.load_ablation(recipe, overrides, scale)
    name = sweep_name(recipe, scale, overrides)
    for trial in trials:
        train.check(trial.experiment)
    store = Store(weights.HOME)
    if dry_run:
        print("\n".join(_plan(ablation, items(store, name, trials))))
        return 0
    check_folder(weights.HOME)
    check_folder(out or weights.HOME / "tables" / name)
    with alone(name):
        run(store, name, ablation, trials, workers or _workers())
    write_table(recipe, overrides, out, scale)
    return 0 if all(i.done for i in items(store, name, trials)) else 1


def run(store: Store, name: str, ablation: Ablation, trials: Sequence[Trial], workers: int) -> None:
    """Train and judge what is missing, several at a time, then measure costs one at a time on a quiet machine."""
    todo = list({i.key: i for i in items(store, name, trials) if not i.done}.values())
    if not todo:
        print(f"{name}: all {len(trials)} trials are done")
        return
    store.create(name)
    parent = parent_run(store, name, ablation.title)
    todo = [i._replace(run=_child(store, name, parent, i)) for i in todo]
    _end(store, name, keep=todo)  # what another process left open when it was killed, and is no trial of now
    try:
        _work_off(store, name, todo, workers)
    except BaseException as error:
        _end(store, name)
        store.finish(parent, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    store.finish(parent, "FINISHED" if all(i.done for i in items(store, name, trials)) else "FAILED")


def _work_off(store: Store, name: str, todo: Sequence[Item], workers: int) -> None:
    judging, frozen = [i for i in todo if not i.judged], _frozen(todo)
    with _progress(name, judging, frozen, todo) as bar, ThreadPoolExecutor(workers) as pool:
        jobs = Jobs(store, name, bar, _cores() // workers or 1)
        try:
            for group in _ranks(frozen):
                _all(pool.map(jobs.frozen, group))
            _all(pool.map(jobs.judge, _by_model([i for i in judging if not jobs.lacks(i)])))
            jobs.threads = _cores()
            jobs.bench([i for i in todo if _judged(store, i)])
        except BaseException:
            jobs.stop()
            raise


def _end(store: Store, name: str, keep: Sequence[Item] = ()) -> None:
    """End the trials' runs that are open as killed; those to keep go on."""
    kept = {i.run.id for i in keep if i.run}
    for run in store.find(name, {"sana.kind": "trial"}):
        if run.status == "RUNNING" and run.id not in kept:
            store.finish(run.id, "KILLED")


class Jobs:
    """Work in processes of its own, so that a crash costs one trial; `stop` ends them all."""

    def __init__(self, store: Store, name: str, bar: "Bar", threads: int) -> None:
        self.store, self.name, self.bar, self.threads = store, name, bar, threads
        self.folder = weights.HOME / "sweeps" / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.running: set[subprocess.Popen[str]] = set()
        self.lost: dict[str, str] = {}  # experiments that could not be trained, and why
        self.stopped = False

    def frozen(self, experiment: str) -> None:
        """Train an experiment whose weights trials take; where that fails, those trials will."""
        if why := self._without(experiments.load(experiment)):
            self.lost[experiment] = why
            return
        title = f"train-{experiment.replace('/', '-')}"
        if self._work(title, {"kind": "train", "name": experiment, "trials": []}):
            log = (self.folder / f"{title}.log").absolute()
            self.lost[experiment] = f"training {experiment!r}, which it takes weights from, failed; see {log}"

    def lacks(self, item: Item) -> bool:
        """Whether a trial takes weights that could not be trained; then its run has failed."""
        why = self._without(item.trial.experiment)
        if why:
            assert item.run is not None
            self.store.set_tags(item.run.id, {"sana.error": why})
            self.store.finish(item.run.id, "FAILED")
        return why is not None

    def _without(self, experiment: schema.Config) -> str | None:
        return next((self.lost[n] for n in experiments.needed(experiment) if n in self.lost), None)

    def judge(self, group: list[Item]) -> None:
        """Train one model and judge every trial of it."""
        self._finish(
            group, self._work(group[0].model, {"kind": "judge", "trials": list(map(_plain, group))}), group[0].model
        )

    def bench(self, group: list[Item]) -> None:
        """Measure the costs of trials, one after the other."""
        if group:
            self._finish(group, self._work("bench", {"kind": "bench", "trials": list(map(_plain, group))}), "bench")

    def stop(self) -> None:
        """At once: a checkpoint and a weights file are whole or not there, so nothing is lost by it."""
        self.stopped = True
        for process in list(self.running):
            process.kill()

    def _work(self, title: str, job: dict[str, Any]) -> int:
        """Run a worker until it ends, feeding the progress bar with what it prints; its exit status."""
        if self.stopped:
            return 0
        path = self.folder / f"{title}.json"
        path.write_text(json.dumps({**job, "threads": self.threads, "store": str(self.store.home), "sweep": self.name}))
        command = [sys.executable, "-m", "sana_lab.ablation.worker", str(path)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "TOKENIZERS_PARALLELISM": "false"}
        with (
            path.with_suffix(".log").open("w") as log,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True, env=environment
            ) as process,
        ):
            self.running.add(process)
            if self.stopped:  # while this one was starting
                process.kill()
            assert process.stdout is not None
            for line in process.stdout:
                self._told(line)
        self.running.discard(process)
        return process.returncode

    def _told(self, line: str) -> None:
        """A worker's line: `@ steps text` moves the bar, `+` also, by what was done before; anything else is talk."""
        mark, _, rest = line.partition(" ")
        if mark in ("@", "+"):
            steps, _, text = rest.strip().partition(" ")
            self.bar.advance(int(steps), counts=mark == "@")
            self.bar.set_postfix_str(text)

    def _finish(self, group: Iterable[Item], status: int, title: str) -> None:
        """A worker that died left runs open: they failed."""
        if not status or self.stopped:
            return
        for item in group:
            assert item.run is not None
            if self.store.run(item.run.id).status == "RUNNING":
                log = (self.folder / f"{title}.log").absolute()
                self.store.set_tags(item.run.id, {"sana.error": f"its process ended with status {status}; see {log}"})
                self.store.finish(item.run.id, "FAILED")


def sweep_name(recipe: str, scale: str | None, overrides: Sequence[str] = ()) -> str:
    """What a sweep of that ablation is called among the runs; folders of its name become part of one word.

    With overrides it is another sweep, whose runs and table do not mix with the plain one's.
    """
    changed = hashlib.sha256(json.dumps(list(overrides)).encode()).hexdigest()[:6]
    return "-".join([recipe.replace("/", "-"), *([scale] if scale else []), *([changed] if overrides else [])])


def write_table(recipe: str, overrides: Sequence[str], out: Path | None, scale: str | None = None) -> None:
    """Table, plots and pictures of what has finished, from the runs in MLflow."""
    ablation, trials = ablations.load_ablation(recipe, overrides, scale)
    name = sweep_name(recipe, scale, overrides)
    folder = out or weights.HOME / "tables" / name
    check_folder(folder)
    store = Store(weights.HOME)
    found = items(store, name, trials)
    write(store, name, ablation, found, folder)


def _plan(ablation: Ablation, found: Sequence[Item]) -> list[str]:
    """The dry run's lines."""
    models = len({i.model for i in found})
    head = f"{ablation.title}: {len(found)} trials of {models} trained models"
    return [head, *(f"  {i.key}  model {i.model}  seed {i.trial.seed}  {i.trial.label:<40} {i.state}" for i in found)]


def _plain(item: Item) -> dict[str, Any]:
    assert item.run is not None
    return {"run": item.run.id, "key": item.key, "label": item.trial.label, "experiment": item.trial.experiment}


def _by_model(group: Sequence[Item]) -> list[list[Item]]:
    models: dict[str, list[Item]] = {}
    for item in group:
        models.setdefault(item.model, []).append(item)
    return list(models.values())


def _frozen(group: Sequence[Item]) -> list[str]:
    """Experiments that trials take weights from, at once or in turn, and that are neither trained nor shipped."""
    names = dict.fromkeys(n for i in group for n in experiments.needed(i.trial.experiment))
    return [n for n in names if weights.ready(experiments.load(n)) is None]


def _ranks(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Experiments in groups, each of which needs only those before it."""
    order = TopologicalSorter({n: set(experiments.needed(experiments.load(n))) & set(names) for n in names})
    order.prepare()
    while group := order.get_ready():
        yield group
        order.done(*group)


def _judged(store: Store, item: Item) -> bool:
    assert item.run is not None
    run = store.run(item.run.id)
    return run.status == "RUNNING" and run.tags.get("sana.judged") == item.key


def parent_run(store: Store, name: str, title: str) -> str:
    """The sweep's own run, the same one when a sweep goes on."""
    old = store.find(name, {"sana.kind": "sweep"})
    if old:
        store.resume(old[0].id)
        return old[0].id
    return store.start_run(name, title, {"sana.kind": "sweep", "sana.sweep": name})


def _child(store: Store, name: str, parent: str, item: Item) -> Run:
    """The trial's run, the one that was interrupted where there is one."""
    if item.run is not None:
        store.resume(item.run.id)
        return store.run(item.run.id)
    trial = item.trial
    labels = {f"label.{axis}": label for axis, label in trial.labels.items()}
    tags = {
        "sana.kind": "trial",
        "sana.sweep": name,
        "sana.trial": item.key,
        "sana.model": item.model,
        "sana.label": trial.label,
        "sana.seed": trial.seed,
        **labels,
        **tracking.environment(),
    }
    title = trial.label if trial.seed == 0 else f"{trial.label} (seed {trial.seed})"
    run = store.start_run(name, title, tags, parent)
    store.log_params(run, trial.experiment)
    return store.run(run)


@contextmanager
def _progress(name: str, judging: Sequence[Item], frozen: Sequence[str], todo: Sequence[Item]) -> Iterator[Bar]:
    models = {i.model: i.trial.experiment for i in judging}
    models |= {f"frozen {n}": experiments.load(n) for n in frozen}
    steps = sum(e["trainer"]["max_steps"] for e in models.values() if weights.ready(e) is None)
    total = steps + JUDGED * len(judging) + BENCHED * len(todo)
    with Bar(name, total) as bar:
        yield bar


@contextmanager
def alone(name: str) -> Iterator[None]:
    """Only one process at a time runs a sweep of this name in this folder."""
    lock = FileLock(weights.HOME / f"{name}.sweep.lock")
    try:
        lock.acquire(timeout=0.1)
    except Timeout as error:
        raise ValueError(f"another process is running the ablation {name!r} in {weights.HOME.absolute()}") from error
    try:
        yield
    finally:
        lock.release()


def _all(results: Iterable[None]) -> None:
    for _ in results:
        pass


def _cores() -> int:
    return tracking.cores()


def _workers() -> int:
    """One process per core, at most two; one where there is a GPU, which two would share badly."""
    import torch

    return 1 if torch.cuda.is_available() else min(2, _cores())


def watch(parent: int) -> threading.Thread:
    """End this process when its parent is gone, so that a killed sweep leaves nothing running."""

    def poll() -> None:
        while os.getppid() == parent:
            threading.Event().wait(2.0)
        os._exit(1)

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    return thread
