"""Eight-bit matrix products in sampling, by torchao: symmetric int8, weights scaled per output channel.

`int8` keeps weights in int8 and multiplies in the network's dtype: less memory, the same arithmetic. `w8a8` rounds
activations too, per token, and multiplies int8 by int8 (SANA, section 4 and Table 5). Both change results a little.
"""

import copy
import importlib.util
from typing import Any

from torch import nn

from sana_lab.models.dit import Dit, Quantize

NOT_QUANTIZED: dict[Quantize, tuple[str, ...]] = {"int8": (), "w8a8": (".cross.kv",)}
"""Projections in the blocks that are not quantised; the paper's W8A8 excludes the caption's keys and values."""


def check(mode: Quantize) -> None:
    """ImportError naming the extra if torchao is needed but not installed."""
    if mode != "none" and not installed():
        raise ImportError(f"quantize {mode!r} needs torchao: pip install 'sana_lab[quantize]'")


def installed() -> bool:
    """Whether torchao is installed."""
    return importlib.util.find_spec("torchao") is not None


def quantize(dit: Dit, mode: Quantize) -> Dit:
    """Quantise the linear layers of the blocks in place; embeddings, norms, convolutions and head keep their dtype.

    A quantised denoiser cannot be trained or quantised again: ValueError for another mode.
    ImportError without torchao.
    """
    if mode == dit.quantized:
        return dit
    if dit.quantized != "none":
        raise ValueError(f"the denoiser is quantised as {dit.quantized!r} already, not {mode!r}; load it again")
    check(mode)
    names = {*layers(dit, mode)}
    from torchao.quantization import quantize_

    quantize_(dit, _config(mode), lambda module, name: name in names)
    dit.quantized = mode
    return dit


def quantized(dit: Dit, mode: Quantize) -> Dit:
    """A quantised copy of the denoiser that shares all other tensors; the denoiser itself if already in that mode."""
    return dit if mode == dit.quantized else quantize(sharing(dit), mode)


def layers(dit: Dit, mode: Quantize) -> list[str]:
    """Names of the linear layers that are quantised, all in the blocks."""
    if mode not in NOT_QUANTIZED:
        raise ValueError(f"quantize is {mode!r}, expected none, {' or '.join(NOT_QUANTIZED)}")
    linear = (name for name, m in dit.named_modules() if isinstance(m, nn.Linear) and name.startswith("blocks."))
    return [name for name in linear if not name.endswith(NOT_QUANTIZED[mode])]


def sharing(module: Any) -> Any:
    """A copy of a module that shares its parameters and buffers."""
    tensors = (*module.parameters(), *module.buffers())
    return copy.deepcopy(module, {id(t): t for t in tensors})


def _config(mode: Quantize) -> Any:
    from torchao import quantization

    configs = {"int8": quantization.Int8WeightOnlyConfig, "w8a8": quantization.Int8DynamicActivationInt8WeightConfig}
    return configs[mode](set_inductor_config=False)  # do not change torch's global settings
