"""Peak memory of a call: CUDA's allocator, or live tensors on other devices."""

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sana_lab.costs.timing import Call, plain


class Memory(NamedTuple):
    """Bytes at the worst moment of one call, what was resident before it included."""

    peak_bytes: int
    resident_bytes: int
    reserved_bytes: int | None  # what the CUDA allocator held at its peak; None on the CPU
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
    """The memory of one call. On CUDA the allocator's own peak, which holds all that is on the device.

    On the CPU the process's size says little: the allocator keeps what was freed, and libraries add their own. There
    the bytes of all live tensors are followed through the call operator by operator: the same number on every machine.
    Counted are `resident` (weights), the inputs and all results; not the workspace inside one operator.
    """
    return _cuda_memory(call) if torch.device(device).type == "cuda" else _live_memory(call, resident)


class LiveBytes(TorchDispatchMode):
    """Follows the storages that operators read and write; a view adds nothing, and a freed storage leaves the sum.

    On the meta device, where nothing is worked out, it finds the same number for sizes that no machine here holds.
    """

    def __init__(self, resident: Iterable[Tensor], device: str = "cpu") -> None:
        super().__init__()
        self.device = device
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
        for tensor in (t for value in values if isinstance(value, Tensor) for t in plain(value)):
            if tensor.device.type == self.device:
                known = self._known.get(id(tensor.untyped_storage()))
                if known is None or known() is not tensor.untyped_storage():
                    yield tensor

    def _follow(self, tensor: Tensor, counted: bool) -> int:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()

        def freed(_: Any) -> None:
            self._known.pop(key, None)
            self.live -= size if counted else 0

        self._known[key] = weakref.ref(storage, freed)
        return size


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
