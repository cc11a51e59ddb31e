"""Throughput in images per second by batch size, doubled until memory is full."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from sana_lab.costs.live_memory import Memory
from sana_lab.costs.out_of_memory import first_line, is_out_of_memory, release_memory
from sana_lab.costs.timing import Energy
from sana_lab.types import Json


class BatchTrial(NamedTuple):
    """The cost of one batch size."""

    batch: int
    seconds: tuple[float, float, float]  # of the whole batch: median and its 95 % interval
    memory: Memory
    energy: Energy | None = None  # of the whole batch

    @property
    def images_per_s(self) -> float:
        return self.batch / self.seconds[0]

    def row(self) -> Json:
        """The trial as plain data."""
        median, low, high = self.seconds
        return {
            "batch": self.batch,
            "images_per_s": self.images_per_s,
            "images_per_s_interval": [self.batch / high, self.batch / low],
            "latency_s": median,
            "peak_mib": self.memory.peak_mib,
            "reserved_mib": self.memory.reserved_mib,
            "energy_j_image": None if self.energy is None else self.energy.joules / self.batch,
        }


def sweep(
    run: Callable[[int], BatchTrial],
    max_batch: int,
    shortfall: Callable[[BatchTrial], str | None] = lambda trial: None,
) -> Json:
    """Trials of 1, 2, 4 ... images up to `max_batch`, the best of them, and why the sweep ended, as plain data.

    `run` measures one batch size; an out-of-memory error ends the sweep, any other error is raised. `shortfall`, called
    before each doubling, returns why the next batch would not fit, for hosts that kill a process instead of refusing
    memory, or None. MemoryError if not even one image fits.
    """
    trials: list[BatchTrial] = []
    end = f"the limit, {max_batch}"
    for batch in batch_sizes(max_batch):
        if trials and (reason := shortfall(trials[-1])):
            end = f"batch {batch} not tried: {reason}"
            break
        trial, error = _attempt(run, batch)
        if trial is None:
            end = f"out of memory at batch {batch}: {error}"
            release_memory()
            break
        trials.append(trial)
    if not trials:
        raise MemoryError(f"not even a batch of one image fits: {end}")
    best = max(trials, key=lambda trial: trial.images_per_s)
    return {**best.row(), "ended_by": end, "trials": [trial.row() for trial in trials]}


def batch_sizes(max_batch: int) -> list[int]:
    """1, 2, 4 ... and `max_batch`. ValueError below 1."""
    if max_batch < 1:
        raise ValueError(f"the largest batch of a sweep is {max_batch}, expected at least 1")
    return sorted({*(2**i for i in range(max_batch.bit_length())), max_batch})


def host_shortfall(trial: BatchTrial, available: Callable[[], int | None] | None = None) -> str | None:
    """Reason why twice this batch would not fit in the host's memory, or None if it would."""
    free = (available or available_host_bytes)()
    needed = 2 * (trial.memory.peak_bytes - trial.memory.resident_bytes)
    if free is None or needed <= free:
        return None
    return f"it would need about {needed / 2**20:.0f} MiB, and {free / 2**20:.0f} MiB are free"


def available_host_bytes(lines: Iterable[str] | None = None) -> int | None:
    """Host memory available to a process by Linux's /proc/meminfo; None elsewhere."""
    file = Path("/proc/meminfo")
    if lines is None:
        lines = file.read_text().splitlines() if file.is_file() else []
    kib = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return None if kib is None else int(kib) * 1024


def _attempt(run: Callable[[int], BatchTrial], batch: int) -> tuple[BatchTrial | None, str]:
    """The trial, or the first line of an out-of-memory error, whose frames (and tensors) are released on return."""
    try:
        return run(batch), ""
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None, first_line(error)
