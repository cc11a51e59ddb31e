"""Steps of a denoiser as CUDA graphs: a thousand launches recorded once, and one launch to replay them.

A graph reads and writes fixed memory, so what a step is given is copied there. One is kept for each kind of step, shape
of latents and length of text; texts are padded to a few lengths, so that those are few.
"""

import warnings
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from sana_lab.costs.timing import plain
from sana_lab.diffusion.guidance import Step, at_once
from sana_lab.models.dit import Dit, Modulation, Prepared
from sana_lab.types import Velocity

Mode = Literal["auto", "never", "always"]
"""Whether steps are replayed: where that works, never, or else it is an error."""

BUCKETS = (32, 64, 128, 300)
"""Text lengths; beyond the last, multiples of it."""

MOST = 4
"""Graphs that are kept; the one that was not used for the longest time is dropped."""

WARM = 3
"""Steps before the recording, in which kernels are compiled, tuned and given their memory."""


class GraphFailed(UserWarning):
    """A step could not be recorded; it is launched kernel by kernel."""


class Replay(Protocol):
    """A recorded call: `run` does it again on what its tensors hold now, and gives its result, always in one place."""

    def run(self) -> Tensor: ...


class CudaReplay:
    """A call recorded as a CUDA graph, warmed up on a stream of its own."""

    def __init__(self, call: Callable[[], Tensor], pool: Any) -> None:
        stream, here = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            for _ in range(WARM):
                call()
        here.wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.out = call()

    def run(self) -> Tensor:
        self.graph.replay()
        return self.out


class Cuda:
    """Records on CUDA devices; all graphs share one pool of memory, as no two run at once."""

    device = "cuda"

    def __init__(self) -> None:
        self.pool: Any = None

    def record(self, call: Callable[[], Tensor]) -> Replay:
        self.pool = torch.cuda.graph_pool_handle() if self.pool is None else self.pool
        return CudaReplay(call, self.pool)


class Graphs:
    """The recorded steps of a system's denoiser; copies begin empty. `recorder` is what records: CUDA, or a test."""

    def __init__(self, recorder: Any = None) -> None:
        self.recorder = Cuda() if recorder is None else recorder
        self.kept: dict[Any, Recorded] = {}
        self.failed: set[Any] = set()
        self.said: set[str] = set()

    def __reduce__(self) -> tuple[type["Graphs"], tuple[()]]:
        return type(self), ()

    def velocity(self, dit: Dit, mode: Mode, step: Step, prepared: Prepared, kind: Hashable) -> Velocity:
        """The denoiser's step with that text, replayed where `mode` has it so. ValueError as `check` says."""
        self.check(dit, mode)
        if mode == "never" or device_of(dit) != self.recorder.device:
            return at_once(step, prepared, kind)
        return Bound(self, dit, mode, step, prepared, kind)

    def check(self, dit: Dit, mode: Mode) -> None:
        """ValueError where `always` is asked for on another device than CUDA."""
        where = device_of(dit)
        if mode == "always" and where != self.recorder.device:
            raise ValueError(
                f"sampling graph is 'always', but the denoiser is on {where!r} and CUDA graphs are for 'cuda'; "
                "expected graph: auto (replayed where that works) or never"
            )

    def find(self, key: Any, record: Callable[[], "Recorded"], strict: bool) -> "Recorded | None":
        """The recorded step, made if it must be; None where that fails, unless it is strict: then the error."""
        if key in self.failed and not strict:
            return None
        if key not in self.kept:
            while len(self.kept) >= MOST:
                del self.kept[next(iter(self.kept))]
            try:
                self.kept[key] = record()
            except RuntimeError as error:  # out of memory is one
                if strict:
                    raise
                self.failed.add(key)
                self._say(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
                return None
        self.kept[key] = self.kept.pop(key)  # the last used is last
        return self.kept[key]

    def _say(self, why: str) -> None:
        """Once for each reason."""
        if why not in self.said:
            self.said.add(why)
            said = f"a step is not replayed as a CUDA graph but launched kernel by kernel, which is slower: {why}"
            warnings.warn(said, GraphFailed, stacklevel=2)


class Bound:
    """A velocity whose steps are replayed for one text."""

    def __init__(self, graphs: Graphs, dit: Dit, mode: Mode, step: Step, prepared: Prepared, kind: Hashable) -> None:
        self.graphs, self.step, self.whole, self.strict = graphs, step, prepared, mode == "always"
        self.prepared = prepared.padded(bucket(prepared.size[1]))
        shapes = tuple((x.shape, x.dtype) for x in _fixed(self.prepared))
        self.key = (id(dit), kind, shapes, self.prepared.mask is None, addresses(dit))

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
            return self.step(x, t, self.whole)
        now = self.prepared.modulation(t)
        prepared = self.prepared._replace(schedule=None, now=now)
        key = (self.key, x.shape, x.dtype, x.device, now is None, torch.is_inference_mode_enabled())
        record = partial(Recorded, self.graphs.recorder, self.step, x, t, prepared)
        found = self.graphs.find(key, record, self.strict)
        return self.step(x, t, self.whole) if found is None else found.run(self, x, t, prepared)


class Recorded:
    """A step with the memory that it reads; whose text is there is known, so that it is copied once."""

    def __init__(self, recorder: Any, step: Step, x: Tensor, t: Tensor, prepared: Prepared) -> None:
        self.x, self.t, self.prepared = x.clone(), t.to(x.device, copy=True), _cloned(prepared)
        self.owner: Bound | None = None
        call = partial(step, self.x, self.t, self.prepared)
        self.replay: Replay = recorder.record(call)
        if not _close(self.replay.run(), call()):
            raise RuntimeError("the recorded step gives another velocity than the step itself")

    def run(self, owner: Bound, x: Tensor, t: Tensor, prepared: Prepared) -> Tensor:
        """A copy of the result: the next replay writes over it."""
        if self.owner is not owner:
            torch._foreach_copy_(_fixed(self.prepared), _fixed(prepared))
            self.owner = owner
        self.x.copy_(x)
        if prepared.now is None or self.prepared.now is None:
            self.t.copy_(t, non_blocking=True)
        else:
            torch._foreach_copy_(_vectors(self.prepared.now), _vectors(prepared.now))
        return self.replay.run().clone()


def bucket(length: int) -> int:
    """The text length that so many tokens are padded to."""
    last = BUCKETS[-1]
    return next((b for b in BUCKETS if b >= length), -(-length // last) * last)


def device_of(dit: Dit) -> str:
    return next(dit.parameters()).device.type


def addresses(dit: Dit) -> tuple[int, ...]:
    """Where the weights lie: a graph reads them there, whatever they have become."""
    return tuple(x.data_ptr() for whole in (*dit.parameters(), *dit.buffers()) for x in plain(whole))


def _fixed(prepared: Prepared) -> list[Tensor]:
    """What stays for a text."""
    mask = [] if prepared.mask is None else [prepared.mask]
    return [*prepared.keys, *prepared.values, *mask, *(prepared.constant or ())]


def _vectors(now: Modulation) -> list[Tensor]:
    return [*now.blocks, now.head]


def _cloned(prepared: Prepared) -> Prepared:
    keys, values = ([x.clone() for x in part] for part in (prepared.keys, prepared.values))
    mask = None if prepared.mask is None else prepared.mask.clone()
    constant = None if prepared.constant is None else [x.clone() for x in prepared.constant]
    now = prepared.now and Modulation([x.clone() for x in prepared.now.blocks], prepared.now.head.clone())
    return prepared._replace(keys=keys, values=values, mask=mask, constant=constant, now=now)


def _close(made: Tensor, expected: Tensor) -> bool:
    """Equal but for what another algorithm of the same product rounds away; values that are not finite aside."""
    a, b = (x.double().nan_to_num(0, 0, 0) for x in (made, expected))
    return bool((a - b).norm() <= 1e-2 * b.norm())
