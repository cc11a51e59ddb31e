"""`sana-lab cache`: encode the pictures and captions of an experiment's data before training, or check them."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import multiprocessing

from sana_lab.checkpoints import weights
from sana_lab.config import experiments, specs
from sana_lab.config.schema import Config
from sana_lab.config.specs import SpecError
from sana_lab.data import DataModule
from sana_lab.data.cached import Cached
from sana_lab.data.ragged import Ragged
from sana_lab.training.checks import check

CACHES = ("cached", "features", "latents")
"""Data sets that are encoded before training."""


def main(
    name: str,
    overrides: Sequence[str],
    train: Callable[[str], None],
    processes: int | None = None,
    verify: bool = False,
    repair: bool = False,
) -> int:
    """The verb. `train` trains an experiment whose weights are needed first. Returns 1 if `verify` finds a broken
    shard."""
    experiment = experiments.load(name, overrides)
    check(experiment)
    spec = experiment["data"]
    if spec["name"] not in CACHES:
        raise SpecError(f"data {spec['name']!r} is not encoded before training; expected one of {', '.join(CACHES)}")
    for prerequisite in experiments.prerequisites(experiment):
        if weights.ready(experiments.load(prerequisite)) is None:
            if verify and not repair:
                raise SpecError(f"experiment {prerequisite!r} encodes this data and is not trained; nothing to verify")
            train(prerequisite)
    data: DataModule = specs.build("data", spec)
    if (verify or repair) and not _is_sound(data, repair):
        return 1
    if not verify or repair:
        _fill(data, spec, max(1, torch.cuda.device_count()) if processes is None else processes)
    return 0


def _fill(data: DataModule, spec: Config, processes: int) -> None:
    if processes < 1:
        raise SpecError(f"--processes is {processes}; expected at least 1")
    data.check_content()
    started = time.perf_counter()
    stores = _stores(data)
    before = sum(store.done() for store in stores)
    if processes == 1:
        with _progress(stores) as update:
            _work(spec, 0, 1, update)
    else:
        _start(spec, stores, processes)
    data.setup("fit")
    seconds, rows = time.perf_counter() - started, sum(store.done() for store in stores) - before
    encoded = f"; {rows:,} rows encoded in {seconds:.1f} s" if stores else ""
    print(f"{data.len_train:,} items to train on, {data.len_val:,} held out{encoded}")
    for store in stores:
        print(f"{store.kind}: {store.folder}")


def _start(spec: Config, stores: list[Ragged], processes: int) -> None:
    """Work in several processes, which share the shards by locks."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool, _progress(stores) as update:
        futures = [pool.submit(_work, spec, k, processes) for k in range(processes)]
        try:
            while (waiting := wait(futures, timeout=1.0)).not_done:
                update()
                _raise(waiting.done)
            _raise(waiting.done)
        except Exception as error:  # the pool waits for the others before anything else is said
            print(f"a process of the encoding failed: {error}; the others end first", file=sys.stderr, flush=True)
            raise


def _raise(futures: set[Future[None]]) -> None:
    try:
        for future in futures:
            future.result()
    except BrokenProcessPool as error:
        raise ValueError("a process of the encoding was killed; the same command goes on where it ended") from error


def _work(spec: Config, number: int, processes: int, update: Any = None) -> None:
    """The work of one process, on its own CUDA device where there are some."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    devices = torch.cuda.device_count()
    data: DataModule = specs.build("data", spec)
    if isinstance(data, Cached):
        device = torch.device(f"cuda:{number % devices}" if devices else "cpu")
        data.fill(lambda what, rows: update() if update else None, device)
    else:
        data.setup("fit")


@contextmanager
def _progress(stores: list[Ragged]) -> Iterator[Any]:
    """A function that shows how many rows of each store are written."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TaskProgressColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        tasks = {bar.add_task(f"encoding {s.kind}", total=s.rows, completed=s.done()): s for s in stores}

        def update() -> None:
            for task, store in tasks.items():
                bar.update(task, completed=store.done())

        yield update


def _stores(data: DataModule) -> list[Ragged]:
    return data.stores.each() if isinstance(data, Cached) else []


def _is_sound(data: DataModule, repair: bool) -> bool:
    """Read every shard, name those that are broken, and remove them to be made again with `repair`."""
    stores = _stores(data)
    if not stores:
        raise SpecError("--verify and --repair are for data: cached")
    shards, broken = 0, list[Path]()
    for store in stores:
        for name, problem in store.verify():
            shards += 1
            if problem is not None:
                print(f"{store.folder / name} {problem}", file=sys.stderr)
                broken.append(store.folder / name)
                if repair:
                    store.discard(name)
    print(f"{shards} shards, {len(broken)} broken")
    return repair or not broken
