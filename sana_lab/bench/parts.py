"""Time of an image from parts of its networks: each part is timed alone and multiplied by its number of calls.

Parts are timed in rounds (A B C, A B C ...), so that a drift of the machine affects all alike, and a part's weights
exist only while it is timed. Parts of equal shapes are timed once in a process, also those of several rows of a table.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch

from sana_lab.bench.probes import ProbeSettings
from sana_lab.costs.batch_sweep import available_host_bytes
from sana_lab.costs.timing import MIN_READING_S, Call, Clock, clock_for, median_interval, quantile, repeated

LONG_S = 2.0
"""Seconds from which a call is a reading without a call to warm up before it."""

MIN_ROUNDS = 2
"""Rounds that every row has, however long they take: without two there is no spread."""

RESERVE = 1.25
"""Memory that has to be free for a part, as a multiple of its weights and live tensors: kernels have workspaces."""

SUMMARY = (
    "each part is timed once in every round, or has the readings of an equal part of another row, and a round is the "
    "sum of readings times calls; medians over rounds, their 95 % interval, or with fewer than six rounds the "
    f"extremes, in brackets. A call below {LONG_S:g} s follows one that is not timed and repeats for "
    f"{MIN_READING_S:g} s"
)
"""`Probe.summary` of probes that time parts."""

STAGES = ("text", "denoise", "decode")

READINGS: dict[str, list[float]] = {}
"""Seconds of a call by key of a part, in the order of the rounds of this process."""


class Part(NamedTuple):
    """A part of a network, such as one block, that is allocated and timed alone."""

    stage: str  # one of STAGES
    name: str
    key: str  # equal for parts of equal cost
    calls: float  # in an image
    bytes: int  # of weights and live tensors during a call
    allocate: Callable[[], AbstractContextManager[Call]]  # within the context the part exists; the call runs it


class Round(NamedTuple):
    """Seconds of an image by stage, from one reading of each part."""

    text: float
    denoise: float
    decode: float

    @property
    def total(self) -> float:
        return self.text + self.denoise + self.decode


def time_parts(
    parts: Sequence[Part],
    settings: ProbeSettings,
    seconds: float,
    clock: Clock | None = None,
    readings: dict[str, list[float]] | None = None,
) -> list[Round]:
    """`settings.repeats` rounds of all parts, of which those after MIN_ROUNDS begin within `seconds` of readings.

    Without gradients, as images are sampled: with them some operators take slower routes.

    MemoryError before any reading if a part does not fit into the free memory of the host.
    """
    check_memory(parts, settings)
    store = READINGS if readings is None else readings
    read_by, spent = clock or clock_for(settings.device), 0.0
    rounds = 0
    while rounds < settings.repeats and (rounds < MIN_ROUNDS or spent <= seconds):
        for part in parts:
            values = store.setdefault(part.key, [])
            if len(values) <= rounds:
                with torch.no_grad(), part.allocate() as call:
                    values.append(read(call, read_by))
                spent += values[-1]
        rounds += 1
    return [round_of(parts, store, i) for i in range(rounds)]


def round_of(parts: Iterable[Part], readings: dict[str, list[float]], index: int) -> Round:
    """The sums over parts of readings times calls."""
    sums = dict.fromkeys(STAGES, 0.0)
    for part in parts:
        sums[part.stage] += part.calls * readings[part.key][index]
    return Round(**sums)


def read(call: Call, clock: Clock) -> float:
    """Seconds of a call. A call below LONG_S warms up first, then is repeated within one reading of MIN_READING_S."""
    first, _ = clock(call)
    if first >= LONG_S:
        return first
    count = max(1, math.ceil(MIN_READING_S / max(first, 1e-9)))
    return clock(repeated(call, count))[0] / count


def check_memory(parts: Iterable[Part], settings: ProbeSettings, available: int | None = None) -> None:
    """MemoryError, naming the part, if one needs more than the free memory of the host."""
    free = available_host_bytes() if available is None else available
    if settings.device.type != "cpu" or free is None:
        return
    for part in parts:
        if RESERVE * part.bytes > free:
            raise MemoryError(
                f"{part.name} takes {RESERVE * part.bytes / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
            )


def columns(rounds: Sequence[Round]) -> dict[str, float]:
    """Metrics of a table: medians over rounds with intervals of latency and throughput, and the range of latency."""
    totals = [r.total for r in rounds]
    middle = quantile(totals, 0.5)
    return {
        **_with_interval("blocks_latency_s", totals),
        "blocks_range": 100 * (max(totals) - min(totals)) / middle,
        "blocks_rounds": len(rounds),
        **_with_interval("blocks_images_per_s", [1 / total for total in totals]),
        **{f"blocks_{stage}_s": quantile([getattr(r, stage) for r in rounds], 0.5) for stage in STAGES},
    }


def _with_interval(name: str, values: Sequence[float]) -> dict[str, float]:
    """The median and its 95 % interval, or the extremes; no interval of fewer than two values."""
    middle = quantile(values, 0.5)
    if len(values) < 2:
        return {name: middle}
    low, high = median_interval(values)
    return {name: middle, f"{name}_low": low, f"{name}_high": high}
