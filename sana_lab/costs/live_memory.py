"""Peak memory of a call: CUDA's allocator, or the bytes of live tensors on other devices."""

import weakref
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sana_lab.costs.timing import Call


class Memory(NamedTuple):
    """Bytes at the peak of one call, including those resident before it."""

    peak_bytes: int
    resident_bytes: int
    reserved_bytes: int | None  # reserved by the CUDA allocator at its peak; None on the CPU
    method: str

    @property
    def peak_mib(self) -> float:
        return self.peak_bytes / 2**20

    @property
    def resident_mib(self) -> float:
        return self.resident_bytes / 2**20

    @property
    def reserved_mib(self) -> float | None:
        return None if self.reserved_bytes is None else self.reserved_bytes / 2**20


def peak_memory(call: Call, device: torch.device | str, resident: Iterable[Tensor] = ()) -> Memory:
    """Peak memory of one call. On CUDA it is the allocator's peak, which includes everything on the device.

    On the CPU the process size is a poor measure: the allocator keeps freed memory, and libraries add their own
    buffers. Instead, the bytes of all live tensors are tracked operator by operator, with the same result on every
    machine: `resident` (weights), inputs and results, without the workspace inside one operator.
    """
    return _cuda_memory(call) if torch.device(device).type == "cuda" else _live_memory(call, resident)


class LiveBytes(TorchDispatchMode):
    """Track the storages that operators read and write: a view adds nothing, a freed storage is subtracted.

    Also works on the meta device, for sizes larger than the machine's memory.
    """

    def __init__(self, resident: Iterable[Tensor], device: str = "cpu") -> None:
        super().__init__()
        self.device = device
        self._tracked: dict[int, weakref.ref[Any]] = {}
        self.resident = self.live = self.peak = 0
        self._add_resident(resident)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._add_resident(tree_leaves((args, kwargs)))
        out = func(*args, **kwargs)
        for tensor in self._untracked(tree_leaves(out)):
            self.live += self._track(tensor, counted=True)
        self.peak = max(self.peak, self.live)
        return out

    def _add_resident(self, values: Iterable[Any]) -> None:
        """Count inputs that no tracked operator produced: allocated before the call and kept during it."""
        self.resident += sum(self._track(tensor, counted=False) for tensor in self._untracked(values))

    def _untracked(self, values: Iterable[Any]) -> Iterable[Tensor]:
        for tensor in (t for value in values if isinstance(value, Tensor) for t in inner_tensors(value)):
            if tensor.device.type == self.device:
                tracked = self._tracked.get(id(tensor.untyped_storage()))
                if tracked is None or tracked() is not tensor.untyped_storage():
                    yield tensor

    def _track(self, tensor: Tensor, counted: bool) -> int:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()

        def freed(_: Any) -> None:
            self._tracked.pop(key, None)
            self.live -= size if counted else 0

        self._tracked[key] = weakref.ref(storage, freed)
        return size


def inner_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors inside a tensor subclass, such as a quantised weight; a plain tensor itself."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield tensor
    else:
        for name in flatten()[0]:
            yield from inner_tensors(getattr(tensor, name))


def module_tensors(modules: Iterable[nn.Module]) -> list[Tensor]:
    """All parameters and buffers, a shared one once."""
    return list({id(t): t for m in modules for t in (*m.parameters(), *m.buffers())}.values())


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the elements of all tensors; of a quantised one, of its inner tensors."""
    return sum(inner.numel() * inner.element_size() for tensor in tensors for inner in inner_tensors(tensor))


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
