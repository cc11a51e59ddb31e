"""Eight-bit products in a denoiser that draws, through torchao: symmetric int8, weights by output channel.

`int8` keeps weights in int8 and multiplies in the network's dtype: less memory, the same arithmetic. `w8a8` rounds
activations too, token by token, and multiplies int8 by int8 (SANA, section 4 and Table 5). Both leave a little error.
"""

import copy
import importlib.util
from typing import Any

from torch import nn

from sana_lab.models.dit import Dit, Quantize

WIDE: dict[Quantize, tuple[str, ...]] = {"int8": (), "w8a8": (".cross.kv",)}
"""Projections of the blocks that stay as they are; the paper's W8A8 keeps the caption's keys and values."""


def check(how: Quantize) -> None:
    """ImportError that names the extra where torchao is needed and not installed."""
    if how != "none" and not installed():
        raise ImportError(f"quantize {how!r} needs torchao: pip install 'sana_lab[quantize]'")


def installed() -> bool:
    """Whether torchao is."""
    return importlib.util.find_spec("torchao") is not None


def quantize(dit: Dit, how: Quantize) -> Dit:
    """The denoiser itself, its blocks' linear layers quantised in place; embeddings, norms, convolutions and head stay.

    What was quantised cannot be undone nor trained: ValueError where it is asked for another way than it has.
    ImportError without torchao.
    """
    if how == dit.quantized:
        return dit
    if dit.quantized != "none":
        raise ValueError(f"the denoiser is quantised as {dit.quantized!r} already, not {how!r}; load it again")
    check(how)
    chosen = {*layers(dit, how)}
    from torchao.quantization import quantize_

    quantize_(dit, _config(how), lambda module, name: name in chosen)
    dit.quantized = how
    return dit


def quantized(dit: Dit, how: Quantize) -> Dit:
    """The denoiser quantised so, as another one that shares all other tensors; itself where there is nothing to do."""
    return dit if how == dit.quantized else quantize(sharing(dit), how)


def layers(dit: Dit, how: Quantize) -> list[str]:
    """The names of the linear layers that are quantised: the products of the blocks."""
    if how not in WIDE:
        raise ValueError(f"quantize is {how!r}, expected none, {' or '.join(WIDE)}")
    found = (name for name, m in dit.named_modules() if isinstance(m, nn.Linear) and name.startswith("blocks."))
    return [name for name in found if not name.endswith(WIDE[how])]


def sharing(module: Any) -> Any:
    """A copy of a module with the same parameters and buffers, not copies of them."""
    tensors = (*module.parameters(), *module.buffers())
    return copy.deepcopy(module, {id(t): t for t in tensors})


def _config(how: Quantize) -> Any:
    from torchao import quantization

    made = {"int8": quantization.Int8WeightOnlyConfig, "w8a8": quantization.Int8DynamicActivationInt8WeightConfig}
    return made[how](set_inductor_config=False)  # torch's own settings stay as they are
