"""Parts of a split network: its units, such as blocks, and the rest."""

from contextlib import AbstractContextManager

import torch

from sana_lab.bench.parts import Part
from sana_lab.bench.record import device_name
from sana_lab.bench.split import Split, Unit
from sana_lab.costs.timing import Call


def network_parts(
    stage: str, name: str, split: Split, calls: float, device: torch.device, dtype: torch.dtype, shapes: str
) -> list[Part]:
    """Parts of one network, called so many times in an image; `shapes` says of what it is called."""
    units = split.record(device, dtype)
    where = machine_key(device, dtype)
    rest = Part(
        stage,
        f"{name} without blocks",
        f"{where} {name} {shapes} {split.key()}",
        calls,
        split.bytes(),
        lambda: split.allocate(device, dtype),
    )
    return [rest, *(unit_part(stage, name, unit, calls, device, dtype) for unit in units)]


def unit_part(
    stage: str, name: str, unit: Unit, calls: float, device: torch.device, dtype: torch.dtype, times: int = 1
) -> Part:
    """The part of a unit, of which the network has `times` as many as recorded."""

    def allocate() -> AbstractContextManager[Call]:
        return unit.allocate(device, dtype)

    words = f"{name}: {type(unit.module).__name__}{_sizes(unit)}"
    key = f"{machine_key(device, dtype)} {unit.key}"
    return Part(stage, words, key, calls * unit.calls * times, unit.bytes(), allocate)


def machine_key(device: torch.device, dtype: torch.dtype) -> str:
    """Device, threads and type of numbers, on which the time of a part depends."""
    return f"{device_name(device)} {dtype}"


def _sizes(unit: Unit) -> str:
    first = next((x for x in (*unit.args, *unit.kwargs.values()) if isinstance(x, torch.Tensor)), None)
    return "" if first is None else f" on {' x '.join(map(str, first.shape))}"
