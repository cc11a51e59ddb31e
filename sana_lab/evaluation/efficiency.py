"""Time and memory of a call: medians with an interval, peaks after a reset, and fair ratios of two calls."""

import math
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Call = Callable[[], Any]
Clock = Callable[[Call], tuple[float, float | None]]
"""Runs a call; its seconds on the host, and on the device where it has a clock of its own."""

NOISE = 0.05
"""A against A may differ by this much; above it, a machine is too busy for a ratio to mean anything."""


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

    @property
    def typical_s(self) -> float:
        """What ratios are made of: the device's own time where it has a clock."""
        return self.median_s if self.device_s is None else self.device_s

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
        )


class Memory(NamedTuple):
    """Bytes at the worst moment of one call, what was resident before it included."""

    peak_bytes: int
    resident_bytes: int
    reserved_bytes: int | None  # what the CUDA allocator held at its peak; None on the CPU
    method: str

    @property
    def peak_mib(self) -> float:
        return self.peak_bytes / 2**20


class Comparison(NamedTuple):
    """Two calls timed alternately; `ratio` > 1 says that ours is faster, None that the machine is too noisy to say."""

    peer: Timing
    ours: Timing
    noise: float  # |peer / peer again - 1|, of medians
    ratio: float | None

    @classmethod
    def of(cls, peer: Timing, ours: Timing, again: Timing) -> "Comparison":
        """Of medians; `again` is the peer a second time."""
        noise = abs(peer.typical_s / again.typical_s - 1)
        return cls(peer, ours, noise, peer.typical_s / ours.typical_s if noise <= NOISE else None)


def measure(call: Call, warmup: int, repeats: int, device: torch.device | str) -> Timing:
    """The timing of `repeats` calls after `warmup` calls that are not counted. ValueError for fewer than one repeat."""
    return interleave({"": call}, warmup, repeats, device)[""]


def interleave(
    calls: Mapping[str, Call], warmup: int, repeats: int, device: torch.device | str, clock: Clock | None = None
) -> dict[str, Timing]:
    """The timing of each call, run in turn (A B C A B C ...), so that a drift of the machine meets all alike."""
    if warmup < 0 or repeats < 1:
        raise ValueError(f"warmup is {warmup} and repeats is {repeats}, expected at least 0 and 1")
    clock = clock or (cuda_clock if torch.device(device).type == "cuda" else host_clock)
    for _ in range(warmup):
        for call in calls.values():
            clock(call)
    rounds = [{name: clock(call) for name, call in calls.items()} for _ in range(repeats)]
    return {name: _timing([r[name] for r in rounds]) for name in calls}


def compare(
    peer: Call, ours: Call, warmup: int, repeats: int, device: torch.device | str, clock: Clock | None = None
) -> Comparison:
    """peer / ours by medians; the peer runs twice in each round, and no ratio is given where it differs from itself."""
    return Comparison.of(**interleave({"peer": peer, "ours": ours, "again": peer}, warmup, repeats, device, clock))


def peak_memory(call: Call, device: torch.device | str, resident: Iterable[Tensor] = ()) -> Memory:
    """The memory of one call. On CUDA the allocator's own peak, which holds all that is on the device.

    On the CPU the process's size says little: the allocator keeps what was freed, and libraries add their own. There
    the bytes of all live tensors are followed through the call operator by operator: the same number on every machine.
    Counted are `resident` (weights), the inputs and all results; not the workspace inside one operator.
    """
    return _cuda_memory(call) if torch.device(device).type == "cuda" else _live_memory(call, resident)


def median_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Bounds of the median at that level, free of distribution; the extremes where there are too few values."""
    ordered, n, k = sorted(values), len(values), 1
    tail = 0.5**n  # P(at most k - 1 of n fall below the median)
    while (tail := tail + math.comb(n, k) * 0.5**n) <= (1 - level) / 2:
        k += 1
    return ordered[k - 1], ordered[n - k]


def quantile(values: Sequence[float], q: float) -> float:
    """By linear interpolation between the ordered values, as numpy's default."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return low + (place - math.floor(place)) * (high - low)


class LiveBytes(TorchDispatchMode):
    """Follows the storages that operators read and write; a view adds nothing, and a freed storage leaves the sum."""

    def __init__(self, resident: Iterable[Tensor]) -> None:
        super().__init__()
        self._known: dict[int, weakref.ref[Any]] = {}
        self.resident = self.live = self.peak = 0
        self._found(resident)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._found(tree_leaves((args, kwargs)))
        out = func(*args, **kwargs)
        for tensor in self._unknown(tree_leaves(out)):
            self.live += self._follow(tensor, counted=True)
        self.peak = max(self.peak, self.live)
        return out

    def _found(self, values: Iterable[Any]) -> None:
        """What an operator reads and none has made was there before, and stays."""
        self.resident += sum(self._follow(tensor, counted=False) for tensor in self._unknown(values))

    def _unknown(self, values: Iterable[Any]) -> Iterable[Tensor]:
        for value in values:
            if isinstance(value, Tensor) and value.device.type == "cpu":
                known = self._known.get(id(value.untyped_storage()))
                if known is None or known() is not value.untyped_storage():
                    yield value

    def _follow(self, tensor: Tensor, counted: bool) -> int:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()

        def freed(_: Any) -> None:
            self._known.pop(key, None)
            self.live -= size if counted else 0

        self._known[key] = weakref.ref(storage, freed)
        return size


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


def _timing(pairs: Sequence[tuple[float, float | None]]) -> Timing:
    return Timing.of([wall for wall, _ in pairs], [device for _, device in pairs if device is not None])


def _cuda_memory(call: Call) -> Memory:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    resident = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return Memory(peak, resident, reserved, "peak of the CUDA allocator")


def _live_memory(call: Call, resident: Iterable[Tensor]) -> Memory:
    with LiveBytes(resident) as mode:
        call()
    return Memory(mode.resident + mode.peak, mode.resident, None, "peak of live tensor bytes")
