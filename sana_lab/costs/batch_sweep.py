"""Images per second by batch size, doubling until memory is full: the throughput of a device, and its batch."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from sana_lab.costs.live_memory import Memory
from sana_lab.costs.out_of_memory import first_line, is_out_of_memory, release
from sana_lab.costs.timing import Energy
from sana_lab.types import Json


class Rung(NamedTuple):
    """One batch size."""

    batch: int
    seconds: tuple[float, float, float]  # of the whole batch: median and its 95 % interval
    memory: Memory
    energy: Energy | None = None  # of the whole batch

    @property
    def images_per_s(self) -> float:
        return self.batch / self.seconds[0]

    def plain(self) -> Json:
        """As a row of plain data, per image where it says so."""
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


def sweep(run: Callable[[int], Rung], most: int, room: Callable[[Rung], str | None] = lambda rung: None) -> Json:
    """Rungs of 1, 2, 4 ... images up to `most`, the best of them, and what ended it, as plain data.

    `run` measures a batch and raises where memory is full; any other error is raised here too. `room` says before a
    batch is doubled why the next would not fit, where the machine would not raise but kill. MemoryError where not even
    one image fits.
    """
    rungs: list[Rung] = []
    end = f"the limit given, {most}"
    for batch in batches(most):
        if rungs and (why := room(rungs[-1])):
            end = f"batch {batch} not tried: {why}"
            break
        rung, error = _attempt(run, batch)
        if rung is None:
            end = f"out of memory at batch {batch}: {error}"
            release()
            break
        rungs.append(rung)
    if not rungs:
        raise MemoryError(f"not even a batch of one image fits: {end}")
    best = max(rungs, key=lambda rung: rung.images_per_s)
    return {**best.plain(), "ended_by": end, "rungs": [rung.plain() for rung in rungs]}


def batches(most: int) -> list[int]:
    """1, 2, 4 ... and `most` itself. ValueError below 1."""
    if most < 1:
        raise ValueError(f"the largest batch of a sweep is {most}, expected at least 1")
    return sorted({*(2**i for i in range(most.bit_length())), most})


def host_room(rung: Rung, available: Callable[[], int | None] | None = None) -> str | None:
    """Why twice this batch would not fit the host's memory: Linux kills a process instead of refusing it memory."""
    free = (available or available_bytes)()
    more = 2 * (rung.memory.peak_bytes - rung.memory.resident_bytes)
    if free is None or more <= free:
        return None
    return f"it would need about {more / 2**20:.0f} MiB, and {free / 2**20:.0f} MiB are free"


def available_bytes(lines: Iterable[str] | None = None) -> int | None:
    """The host memory that a process can still take, where Linux says so."""
    file = Path("/proc/meminfo")
    if lines is None:
        lines = file.read_text().splitlines() if file.is_file() else []
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def _attempt(run: Callable[[int], Rung], batch: int) -> tuple[Rung | None, str]:
    """The rung, or the first line of what was said when memory was full; the error's frames are let go here."""
    try:
        return run(batch), ""
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None, first_line(error)
