"""Denoiser steps as CUDA graphs: about a thousand kernel launches are captured once and replayed by one launch.

A graph reads and writes fixed memory, so a step's inputs are copied into it. There is one graph per kind of step, shape
of latents and text length; texts are padded to a few lengths to limit the number of graphs.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from sana_lab.costs.live_memory import inner_tensors
from sana_lab.models.dit import Dit, SamplingDit
from sana_lab.types import Velocity

Mode = Literal["auto", "never", "always"]
"""Replay of steps: if possible, never, or always (with an error if impossible)."""

BUCKETS = (32, 64, 128, 304)
"""Padded text lengths in tokens, multiples of 8 as fused attention needs; beyond the last, multiples of it."""

MAX_GRAPHS = 4
"""Graphs in memory; the least recently used one is dropped."""

WARM_UP_STEPS = 3
"""Steps before the recording, in which kernels are compiled and tuned and memory is allocated."""


class GraphFailed(UserWarning):
    """A step could not be recorded and is launched kernel by kernel."""


class Replay(Protocol):
    """A recorded call: `run` repeats it on the present values of its tensors and returns its one output tensor."""

    def run(self) -> Tensor: ...


class CudaReplay:
    """A call captured in a CUDA graph after warm-up on a side stream."""

    def __init__(self, call: Callable[[], Tensor], pool: Any) -> None:
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                call()
        current.wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.out = call()

    def run(self) -> Tensor:
        self.graph.replay()
        return self.out


class Cuda:
    """Recorder for CUDA devices; all graphs share one memory pool, since no two run at once."""

    device = "cuda"

    def __init__(self) -> None:
        self.pool: Any = None

    def record(self, call: Callable[[], Tensor]) -> Replay:
        self.pool = torch.cuda.graph_pool_handle() if self.pool is None else self.pool
        return CudaReplay(call, self.pool)


class Graphs:
    """LRU cache of the recorded steps of a system's denoiser; a copy of it is empty. Tests give another `recorder`."""

    def __init__(self, recorder: Any = None) -> None:
        self.recorder = Cuda() if recorder is None else recorder
        self.recorded: dict[Any, Recorded] = {}
        self.failed: set[Any] = set()
        self.warned: set[str] = set()

    def __reduce__(self) -> tuple[type["Graphs"], tuple[()]]:
        return type(self), ()

    def velocity(self, mode: Mode, model: SamplingDit) -> Velocity:
        """The denoiser's velocity, replayed where `mode` allows it. ValueError as in `check`."""
        self.check(model.dit, mode)
        if mode == "never" or device_of(model.dit) != self.recorder.device:
            return model
        return Bound(self, mode, model)

    def check(self, dit: Dit, mode: Mode) -> None:
        """ValueError for the mode `always` on another device than CUDA."""
        device = device_of(dit)
        if mode == "always" and device != self.recorder.device:
            raise ValueError(
                f"sampling graph is 'always', but the denoiser is on {device!r} and CUDA graphs are for 'cuda'; "
                "expected graph: auto (replayed where that works) or never"
            )

    def find(self, key: Any, record: Callable[[], "Recorded"], strict: bool) -> "Recorded | None":
        """The recorded step of a key, recorded on first use; if that fails, None, or the error if `strict`."""
        if key in self.failed and not strict:
            return None
        if key not in self.recorded:
            while len(self.recorded) >= MAX_GRAPHS:
                del self.recorded[next(iter(self.recorded))]
            try:
                self.recorded[key] = record()
            except RuntimeError as error:  # out of memory is one
                if strict:
                    raise
                self.failed.add(key)
                self._warn_once(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
                return None
        self.recorded[key] = self.recorded.pop(key)  # least recently used first
        return self.recorded[key]

    def _warn_once(self, reason: str) -> None:
        if reason not in self.warned:
            self.warned.add(reason)
            message = f"a step is not replayed as a CUDA graph but launched kernel by kernel, which is slower: {reason}"
            warnings.warn(message, GraphFailed, stacklevel=2)


class Bound:
    """The velocity of one batch of captions, whose steps are replayed."""

    def __init__(self, graphs: Graphs, mode: Mode, model: SamplingDit) -> None:
        self.graphs, self.model, self.strict = graphs, model, mode == "always"
        self.padded = model.padded(bucket(model.length))
        self.key = (id(model.dit), model.variant, layout(self.padded.tensors), addresses(model.dit))

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
            return self.model(x, t)
        inputs = self.padded.step_inputs(t)
        key = (self.key, layout([x, *inputs]), x.device, torch.is_inference_mode_enabled())
        recorded = self.graphs.find(key, partial(Recorded, self.graphs.recorder, self.padded, x, inputs), self.strict)
        return self.model(x, t) if recorded is None else recorded.run(self, x, inputs)


class Recorded:
    """A recorded step with the memory that it reads; the captions' part is copied when they change."""

    def __init__(self, recorder: Any, model: SamplingDit, x: Tensor, inputs: Sequence[Tensor]) -> None:
        self.x, self.inputs, self.model = x.clone(), [i.clone() for i in inputs], model.map(torch.clone)
        self.owner: Bound | None = None  # the batch whose captions are in the graph's memory
        call = partial(self.model.step, self.x, self.inputs)
        self.replay: Replay = recorder.record(call)
        if not _close(self.replay.run(), call()):
            raise RuntimeError("the recorded step gives another velocity than the step itself")

    def run(self, owner: Bound, x: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """A copy of the result: the next replay writes over it."""
        if self.owner is not owner:
            torch._foreach_copy_(self.model.tensors, owner.padded.tensors)
            self.owner = owner
        torch._foreach_copy_([self.x, *self.inputs], [x, *inputs])
        return self.replay.run().clone()


def layout(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """Shapes and dtypes; bool tells a mask from keys and values."""
    return tuple((x.shape, x.dtype) for x in tensors)


def bucket(length: int) -> int:
    """The length that a text of `length` tokens is padded to."""
    last = BUCKETS[-1]
    return next((b for b in BUCKETS if b >= length), -(-length // last) * last)


def device_of(dit: Dit) -> str:
    """The kind of device of its weights."""
    return next(dit.parameters()).device.type


def addresses(dit: Dit) -> tuple[int, ...]:
    """Addresses of the weights read by a graph; other addresses need another graph."""
    return tuple(x.data_ptr() for whole in (*dit.parameters(), *dit.buffers()) for x in inner_tensors(whole))


def _close(replayed: Tensor, expected: Tensor) -> bool:
    """Equal to 1 % in norm, since a product may use another algorithm; values that are not finite are ignored."""
    a, b = (x.double().nan_to_num(0, 0, 0) for x in (replayed, expected))
    return bool((a - b).norm() <= 1e-2 * b.norm())
