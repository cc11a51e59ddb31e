"""Time and energy of calls: medians and quantiles with intervals, and ratios of interleaved calls."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from sana_lab.intervals import quantile_interval

Call = Callable[[], Any]
Clock = Callable[[Call], tuple[float, float | None]]
"""Function that runs a call and returns its seconds on the host and on the device (None if not measured)."""

MAX_NOISE, MIN_PAIRS = 0.05, 3
"""A ratio requires at least MIN_PAIRS interleaved rounds, and minima of the same call timed twice (A against A) that
differ by at most MAX_NOISE."""


MIN_READING_S = 0.05
"""Minimum seconds of one reading; shorter calls are `repeated` within a reading."""


class Timing(NamedTuple):
    """Summary of the seconds of one call, the device synchronised before and after."""

    median_s: float
    p90_s: float
    low_s: float  # 95 % interval of the median, by order statistics; below 6 samples the smallest and the largest
    high_s: float
    min_s: float
    iqr_s: float  # interquartile range
    n: int
    device_s: float | None = None  # median between CUDA events, without the host's time before and after
    device_min_s: float | None = None

    @property
    def typical_s(self) -> float:
        """Median used in ratios: device time if measured, else host time."""
        return self.median_s if self.device_s is None else self.device_s

    @property
    def fastest_s(self) -> float:
        """Minimum of device time if measured, else of host time."""
        return self.min_s if self.device_min_s is None else self.device_min_s

    @classmethod
    def of(cls, seconds: Sequence[float], device: Sequence[float] = ()) -> "Timing":
        """The summary of at least one sample."""
        if not seconds:
            raise ValueError("a timing needs at least one sample")
        low, high = median_interval(seconds)
        quartiles = [quantile(seconds, q) for q in (0.25, 0.75)]
        return cls(
            median_s=quantile(seconds, 0.5),
            p90_s=quantile(seconds, 0.9),
            low_s=low,
            high_s=high,
            min_s=min(seconds),
            iqr_s=quartiles[1] - quartiles[0],
            n=len(seconds),
            device_s=quantile(device, 0.5) if device else None,
            device_min_s=min(device) if device else None,
        )


class Percentile(NamedTuple):
    """A quantile with its distribution-free 95 % interval; None if there are too few samples."""

    value: float | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, values: Sequence[float], q: float) -> "Percentile":
        """Quantile q of n samples; its value is None beyond n / (n + 1), which the largest sample estimates."""
        enough = len(values) / (len(values) + 1) >= q
        return cls(quantile(values, q) if enough else None, *quantile_interval(values, q))


class Samples(NamedTuple):
    """All readings of one call."""

    wall: tuple[float, ...]  # seconds
    device: tuple[float, ...] = ()  # seconds between CUDA events; empty on the CPU
    first_s: float | None = None  # the first warm-up call, with compilation and tuning; None without warm-up

    @property
    def timing(self) -> Timing:
        return Timing.of(self.wall, self.device)


class Energy(NamedTuple):
    """Energy of one call, averaged over `calls` by a hardware counter."""

    joules: float
    calls: int
    seconds: float  # of all calls


class Comparison(NamedTuple):
    """Two calls timed in turns; `ratio` > 1 means that ours is faster; None means that the machine is too noisy."""

    peer: Timing
    ours: Timing
    noise: float  # |peer / peer again - 1|, of the minima
    ratio: float | None

    @classmethod
    def of(cls, peer: Timing, ours: Timing, again: Timing) -> "Comparison":
        """The ratio of medians; `again` is the peer timed a second time in the same rounds."""
        noise = abs(peer.fastest_s / again.fastest_s - 1)
        valid = noise <= MAX_NOISE and min(peer.n, ours.n, again.n) >= MIN_PAIRS
        return cls(peer, ours, noise, peer.typical_s / ours.typical_s if valid else None)


def interleave(
    calls: Mapping[str, Call], warmup: int, repeats: int, device: torch.device | str, clock: Clock | None = None
) -> dict[str, Timing]:
    """The timing of each call, run in turns (A B C A B C ...) so that a drift of the machine affects all alike."""
    samples = collect_samples(calls, warmup, repeats, device, clock)
    return {name: readings.timing for name, readings in samples.items()}


def collect_samples(
    calls: Mapping[str, Call], warmup: int, repeats: int, device: torch.device | str, clock: Clock | None = None
) -> dict[str, Samples]:
    """The samples of each call, run in turns. ValueError for a negative warm-up or fewer than one repeat."""
    if warmup < 0 or repeats < 1:
        raise ValueError(f"warmup is {warmup} and repeats is {repeats}, expected at least 0 and 1")
    clock = clock or clock_for(device)
    rounds = [{name: clock(call) for name, call in calls.items()} for _ in range(warmup + repeats)]
    return {name: _samples([r[name] for r in rounds], warmup) for name in calls}


def energy_per_call(call: Call, joules: Callable[[], float | None], seconds: float, clock: Clock) -> Energy | None:
    """Energy of one call, repeated for at least `seconds`; None if the counter is missing or does not advance.

    `joules` reads the counter of the whole device, which includes its idle power and other processes.
    """
    before, calls, elapsed = joules(), 0, 0.0
    if before is None:
        return None
    while not calls or elapsed < seconds:
        elapsed += clock(call)[0]
        calls += 1
    after = joules()
    return Energy((after - before) / calls, calls, elapsed) if after is not None and after > before else None


def repeated(call: Call, n: int) -> Call:
    """n calls in one."""

    def loop() -> None:
        for _ in range(n):
            call()

    return loop


def clock_for(device: torch.device | str) -> Clock:
    """The clock that waits for calls on a device to end."""
    return cuda_clock if torch.device(device).type == "cuda" else host_clock


def median_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Distribution-free bounds of the median; the extremes if there are too few values."""
    low, high = quantile_interval(values, 0.5, level)
    return min(values) if low is None else low, max(values) if high is None else high


def samples_needed(q: float, level: float = 0.95) -> int:
    """The fewest samples that bound quantile q from both sides."""
    return int(np.ceil(np.log((1 - level) / 2) / np.log(max(q, 1 - q))))


def quantile(values: Sequence[float], q: float) -> float:
    """Quantile q with linear interpolation."""
    return float(np.quantile(values, q))


def host_clock(call: Call) -> tuple[float, None]:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start, None


def cuda_clock(call: Call) -> tuple[float, float]:
    """Wall time between synchronisations, and time between events on the stream."""
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start = time.perf_counter()
    before.record()
    call()
    after.record()
    torch.cuda.synchronize()
    return time.perf_counter() - start, before.elapsed_time(after) / 1e3


def _samples(pairs: Sequence[tuple[float, float | None]], warmup: int) -> Samples:
    timed = pairs[warmup:]
    device = tuple(seconds for _, seconds in timed if seconds is not None)
    return Samples(tuple(wall for wall, _ in timed), device, pairs[0][0] if warmup else None)
