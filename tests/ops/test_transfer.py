"""Copies to a device: which are pinned and which are asynchronous; no device is needed."""

import pytest
import torch
from torch import Tensor

from sana_lab.ops import transfer


class Recorded(Tensor):
    """A tensor that records the calls of pin_memory and to."""

    calls: list[str]

    def pin_memory(self, *_: object) -> "Recorded":  # type: ignore[override]
        self.calls.append("pin")
        return self

    def is_pinned(self, *_: object) -> bool:  # type: ignore[override]
        return False

    def to(self, device: torch.device, dtype: object, non_blocking: bool) -> "Recorded":  # type: ignore[override]
        self.calls.append(f"to {device.type}, {'asynchronous' if non_blocking else 'synchronous'}")
        return self


@pytest.mark.parametrize(
    ("numbers", "device", "calls"),
    [
        (4, "cuda", ["to cuda, asynchronous"]),  # staged by the driver
        (2**16, "cuda", ["pin", "to cuda, asynchronous"]),
        (2**16, "cpu", ["to cpu, synchronous"]),
        (2**16, "mps", ["to mps, synchronous"]),
    ],
)
def test_large_copies_to_cuda_are_pinned_first(numbers: int, device: str, calls: list[str]) -> None:
    x = torch.zeros(numbers).as_subclass(Recorded)
    x.calls = []
    transfer.to_device(x, torch.device(device))
    assert x.calls == calls


def test_value_and_dtype() -> None:
    x = torch.arange(5)
    assert torch.equal(transfer.to_device(x, torch.device("cpu"), torch.float64), x.double())
