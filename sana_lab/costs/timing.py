"""Time, memory and energy of a call: quantiles with intervals, peaks after a reset, and fair ratios of two calls."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Call = Callable[[], Any]
Clock = Callable[[Call], tuple[float, float | None]]
"""Runs a call; its seconds on the host, and on the device where it has a clock of its own."""

NOISE, PAIRS = 0.05, 3
"""A against A, the least time of so many interleaved pairs or more, may differ by this much; above it, or with fewer
pairs, a machine is too busy for a ratio to mean anything."""


class Timing(NamedTuple):
    """Seconds of wall-clock time of one call, the device synchronised before and after."""

    median_s: float
    p90_s: float
    low_s: float  # 95 % interval of the median, by order statistics; below 6 samples the smallest and the largest
    high_s: float
    min_s: float
    iqr_s: float  # between the quartiles
    n: int
    device_s: float | None = None  # median between CUDA events: without what the host adds before and after
    device_min_s: float | None = None

    @property
    def typical_s(self) -> float:
        """What ratios are made of: the device's own time where it has a clock."""
        return self.median_s if self.device_s is None else self.device_s

    @property
    def least_s(self) -> float:
        """The least time, likewise: what the machine cannot have made longer."""
        return self.min_s if self.device_min_s is None else self.device_min_s

    @classmethod
    def of(cls, seconds: Sequence[float], device: Sequence[float] = ()) -> "Timing":
        """The summary of at least one sample."""
        if not seconds:
            raise ValueError("a timing needs at least one sample")
        ordered = sorted(seconds)
        low, high = median_interval(ordered)
        return cls(
            median_s=quantile(ordered, 0.5),
            p90_s=quantile(ordered, 0.9),
            low_s=low,
            high_s=high,
            min_s=ordered[0],
            iqr_s=quantile(ordered, 0.75) - quantile(ordered, 0.25),
            n=len(ordered),
            device_s=quantile(device, 0.5) if device else None,
            device_min_s=min(device) if device else None,
        )


class Percentile(NamedTuple):
    """A quantile of samples with its 95 % interval, free of distribution; None is what so few samples cannot say."""

    value: float | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, values: Sequence[float], q: float) -> "Percentile":
        """The largest of n samples stands for the quantile n / (n + 1); one beyond that has no value."""
        known = len(values) / (len(values) + 1) >= q
        return cls(quantile(values, q) if known else None, *quantile_interval(values, q))


class Samples(NamedTuple):
    """What a clock said of one call, time after time."""

    wall: tuple[float, ...]  # seconds
    device: tuple[float, ...] = ()  # between CUDA events, where there are any
    first_s: float | None = None  # the first call of all, where it was a warm-up: compilation and tuning are in it

    @property
    def timing(self) -> Timing:
        return Timing.of(self.wall, self.device)


class Energy(NamedTuple):
    """Of one call, by the driver's counter over several."""

    joules: float
    calls: int
    seconds: float


class Comparison(NamedTuple):
    """Two calls timed alternately; `ratio` > 1 says that ours is faster, None that the machine is too noisy to say."""

    peer: Timing
    ours: Timing
    noise: float  # |peer / peer again - 1|, of the least times
    ratio: float | None

    @classmethod
    def of(cls, peer: Timing, ours: Timing, again: Timing) -> "Comparison":
        """Of medians; `again` is the peer a second time, in the same rounds."""
        noise = abs(peer.least_s / again.least_s - 1)
        fit = noise <= NOISE and min(peer.n, ours.n, again.n) >= PAIRS
        return cls(peer, ours, noise, peer.typical_s / ours.typical_s if fit else None)


def measure(call: Call, warmup: int, repeats: int, device: torch.device | str) -> Timing:
    """The timing of `repeats` calls after `warmup` calls that are not counted. ValueError for fewer than one repeat."""
    return interleave({"": call}, warmup, repeats, device)[""]


def interleave(
    calls: Mapping[str, Call], warmup: int, repeats: int, device: torch.device | str, clock: Clock | None = None
) -> dict[str, Timing]:
    """The timing of each call, run in turn (A B C A B C ...), so that a drift of the machine meets all alike."""
    return {name: found.timing for name, found in sample(calls, warmup, repeats, device, clock).items()}


def sample(
    calls: Mapping[str, Call], warmup: int, repeats: int, device: torch.device | str, clock: Clock | None = None
) -> dict[str, Samples]:
    """The same, every sample kept. ValueError for fewer than one repeat."""
    if warmup < 0 or repeats < 1:
        raise ValueError(f"warmup is {warmup} and repeats is {repeats}, expected at least 0 and 1")
    clock = clock or clock_of(device)
    rounds = [{name: clock(call) for name, call in calls.items()} for _ in range(warmup + repeats)]
    return {name: _samples([r[name] for r in rounds], warmup) for name in calls}


def energy(call: Call, joules: Callable[[], float | None], seconds: float, clock: Clock) -> Energy | None:
    """The energy of one call, repeated for at least so many seconds; None where the counter gives nothing or stands.

    `joules` reads the counter: all that the device has used so far, with its idle power and with whoever else uses it.
    """
    before, calls, spent = joules(), 0, 0.0
    if before is None:
        return None
    while not calls or spent < seconds:
        spent += clock(call)[0]
        calls += 1
    after = joules()
    return Energy((after - before) / calls, calls, spent) if after is not None and after > before else None


def clock_of(device: torch.device | str) -> Clock:
    """The clock for calls on a device: they have ended when it stops."""
    return cuda_clock if torch.device(device).type == "cuda" else host_clock


def median_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Bounds of the median at that level, free of distribution; the extremes where there are too few values."""
    low, high = quantile_interval(values, 0.5, level)
    return min(values) if low is None else low, max(values) if high is None else high


def quantile_interval(values: Sequence[float], q: float, level: float = 0.95) -> tuple[float | None, float | None]:
    """Bounds of a quantile by order statistics; None where even the extreme of so few values does not bound it."""
    ordered, n, tail = sorted(values), len(values), (1 - level) / 2
    low, high = _rank(n, q, tail), _rank(n, 1 - q, tail)
    return ordered[low - 1] if low else None, ordered[n - high] if high else None


def enough_for(q: float, level: float = 0.95) -> int:
    """How many samples bound a quantile from both sides: the fewest whose largest lies above it surely enough."""
    return math.ceil(math.log((1 - level) / 2) / math.log(max(q, 1 - q)))


def _rank(n: int, q: float, tail: float) -> int:
    """The largest k for which at most k - 1 of n values fall below the quantile with that probability; 0 if none."""
    k, below = 0, 0.0
    while k < n and (below := below + _binomial(n, k, q)) <= tail:
        k += 1
    return k


def _binomial(n: int, k: int, q: float) -> float:
    ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return math.exp(ways + k * math.log(q) + (n - k) * math.log(1 - q))


def quantile(values: Sequence[float], q: float) -> float:
    """By linear interpolation between the ordered values, as numpy's default."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return low + (place - math.floor(place)) * (high - low)


def plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold a quantised one's numbers; of any other, itself."""
    inner = getattr(tensor, "__tensor_flatten__", None)
    if inner is None:
        yield tensor
    else:
        for name in inner()[0]:
            yield from plain(getattr(tensor, name))


def host_clock(call: Call) -> tuple[float, None]:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start, None


def thread_clock(call: Call) -> tuple[float, None]:
    """Processor time of this thread alone: for one-threaded work on a machine that others use."""
    start = time.thread_time()
    call()
    return time.thread_time() - start, None


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
