"""State of optimisers: averages in 8 bits, and restoring without a cast to the parameters' type.

8-bit averages are those of Dettmers et al. (arXiv 2110.02861): blocks of values, each with a scale, in a dynamic code
of 256 values; code and rounding are torchao's. A checkpoint holds them as plain tensors.
"""

import importlib.util
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from sana_lab.systems.steps import GroupSteps

BLOCK = 256
"""Values with one scale."""

LEAST = 16384
"""Values of the smallest tensor whose average is in 8 bits; smaller ones weigh little."""


def check(optimizer: str) -> None:
    """ImportError naming the extra if torchao is not installed."""
    if importlib.util.find_spec("torchao") is None:
        raise ImportError(f"optimizer {optimizer} needs torchao for its 8-bit state: pip install 'sana_lab[quantize]'")


def fits(parameter: Tensor) -> bool:
    """Whether the average of a parameter is kept in 8 bits: if it is large and divides into blocks."""
    return parameter.numel() >= LEAST and parameter.numel() % BLOCK == 0


def zeros(parameter: Tensor) -> dict[str, Tensor]:
    """An average of zero: codes (n,) uint8 and a scale (n / BLOCK,) for each block."""
    n, device = parameter.numel(), parameter.device
    return {
        "codes": torch.zeros(n, dtype=torch.uint8, device=device),
        "scale": torch.zeros(n // BLOCK, device=device),
    }


def read(state: Mapping[str, Tensor], signed: bool) -> Tensor:
    """The values (n,) in float32."""
    from torchao.optim.quant_utils import dequant_with_qmap

    values: Tensor = dequant_with_qmap(state["codes"], _code(signed, state["codes"].device), state["scale"])
    return values


def write(state: Mapping[str, Tensor], values: Tensor, signed: bool) -> None:
    """Round values of any shape to codes in place."""
    from torchao.optim.quant_utils import quantize_8bit_with_qmap, scale_tensor

    scaled, scale = scale_tensor(values.flatten(), BLOCK)
    state["codes"].copy_(quantize_8bit_with_qmap(scaled, _code(signed, values.device)))
    state["scale"].copy_(scale)


_codes: dict[tuple[bool, torch.device], Tensor] = {}


def _code(signed: bool, device: torch.device) -> Tensor:
    """The 256 values of a code, ascending, in [-1, 1] or [0, 1]."""
    from torchao.optim.quant_utils import create_dynamic_map

    if (signed, device) not in _codes:
        _codes[signed, device] = torch.tensor(create_dynamic_map(signed), device=device)
    return _codes[signed, device]


def restore(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Give the state tensors of a loaded optimiser the types that they were saved in: torch casts them to those of the
    parameters. The count of steps stays on the CPU, where each step reads it."""
    own = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    keys = chain.from_iterable(group["params"] for group in saved["param_groups"])
    for parameter, key in zip(own, keys, strict=True):
        for name, value in saved["state"].get(key, {}).items():
            if isinstance(value, Tensor):
                device = torch.device("cpu") if name == "step" else parameter.device
                optimizer.state[parameter][name] = value.to(device, copy=True)


class TypedState(GroupSteps):
    """An optimiser that restores its state in the types that it was saved in, where torch casts it to a parameter's."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        restore(self, state_dict)
