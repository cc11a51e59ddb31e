"""Matrix products of fewer bits in sampling. All change results a little.

`int8` keeps weights in int8 and multiplies in the network's dtype: memory, not speed. `w8a8` rounds activations too,
per token, and multiplies int8 by int8 (SANA, section 4 and Table 5); on a GPU it is slower than bfloat16 unless
compiled. Both are torchao's. `fp8` multiplies e4m3 values with a scale per token and per output channel. The
`simulated` ones round alike and multiply in full precision: quality without the device, and no speed.
"""

import copy
import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sana_lab.models.dit import Dit
from sana_lab.systems.low_bit_layers import ROUNDINGS, Fp8Linear, LowRankLinear, smoothing

LARGE = (".attention.qkv", ".attention.proj", ".ffn.expand", ".ffn.project")
"""The four large projections of a block."""

TORCHAO: dict[str, tuple[str, ...]] = {"int8": (), "w8a8": (".cross.kv",)}
"""torchao's modes -> projections in the blocks that are not quantised; the paper's W8A8 excludes the caption's keys and
values."""

MODES = (*TORCHAO, "fp8", "fp8_simulated", *ROUNDINGS)

FP8_CAPABILITY = (8, 9)
"""Least compute capability of CUDA devices that multiply e4m3."""


def check(mode: str, *, here: bool = True) -> None:
    """ImportError naming the extra if torchao is needed and not installed; ValueError if no device of
    this machine has fp8, if it is this one that samples (`here`)."""
    if mode in TORCHAO and not installed():
        raise ImportError(f"quantize {mode!r} needs torchao: pip install 'sana_lab[quantize]'")
    if here and mode == "fp8" and not has_fp8():
        raise ValueError(
            "quantize 'fp8' needs a CUDA device of compute capability 8.9 or more (Ada, Hopper), and this machine has "
            "none; expected fp8_simulated, the same rounding without the speed"
        )


def has_fp8() -> bool:
    """Whether there is a CUDA device that multiplies e4m3."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= FP8_CAPABILITY


def installed() -> bool:
    """Whether torchao is installed."""
    return importlib.util.find_spec("torchao") is not None


def is_simulated(mode: str) -> bool:
    """Whether a mode rounds as its device would and has no speed of its own."""
    return mode.partition(":")[0].endswith("_simulated")


def needs_activations(dit: Dit, precision: str) -> bool:
    """Whether quantising so needs `activations`: a correction of some rank, which the denoiser does not have yet."""
    return ":" in precision and precision != dit.quantized


def quantize(dit: Dit, precision: str, activations: Mapping[str, Tensor] | None = None) -> Dit:
    """Quantise linear layers of the blocks in place; embeddings, norms, convolutions and head keep their dtype.

    `precision` is `Sampling.precision`, a mode or `mode:rank`; with a rank, `activations` are the largest magnitudes
    (K,) of each layer's inputs by channel. A quantised denoiser cannot be trained or quantised again: ValueError for
    another precision. ImportError without torchao.
    """
    if precision == dit.quantized:
        return dit
    if dit.quantized != "none":
        raise ValueError(f"the denoiser is quantised as {dit.quantized!r} already, not {precision!r}; load it again")
    mode, _, rank = precision.partition(":")
    check(mode)
    names = {*layers(dit, mode)}
    if mode in TORCHAO:
        _by_torchao(dit, mode, names)
    else:
        for name in names:
            parent, _, last = name.rpartition(".")
            layer: Any = dit.get_submodule(name)
            inputs = None if activations is None else activations[name]
            setattr(dit.get_submodule(parent), last, _layer(layer, mode, int(rank) if rank else None, inputs))
    dit.quantized = precision
    return dit


def quantized(dit: Dit, precision: str, activations: Mapping[str, Tensor] | None = None) -> Dit:
    """A quantised copy of the denoiser that shares all other tensors; itself if it has that precision already."""
    return dit if precision == dit.quantized else quantize(sharing(dit), precision, activations)


def layers(dit: Dit, mode: str) -> list[str]:
    """Names of the linear layers that are quantised, all in the blocks."""
    if mode not in MODES:
        raise ValueError(f"quantize is {mode!r}, expected none, {', '.join(MODES[:-1])} or {MODES[-1]}")
    linear = [name for name, m in dit.named_modules() if isinstance(m, nn.Linear) and name.startswith("blocks.")]
    if mode in TORCHAO:
        return [name for name in linear if not name.endswith(TORCHAO[mode])]
    return [name for name in linear if name.endswith(LARGE)]


def _layer(layer: nn.Linear, mode: str, rank: int | None, inputs: Tensor | None) -> nn.Module:
    """A layer of 8-bit floats, or of 4 bits: without a rank, rounded alone and not smoothed."""
    if mode not in ROUNDINGS:
        return Fp8Linear(layer, simulated=is_simulated(mode))
    if rank is None:
        return LowRankLinear(layer, ROUNDINGS[mode], 0, torch.ones_like(layer.weight[0], dtype=torch.float32))
    assert inputs is not None, "a correction needs activations"
    return LowRankLinear(layer, ROUNDINGS[mode], rank, smoothing(inputs, layer.weight.detach()))


def _by_torchao(dit: Dit, mode: str, names: set[str]) -> None:
    from torchao.quantization import quantize_

    quantize_(dit, _config(mode), lambda module, name: name in names)


def sharing(module: Any) -> Any:
    """A copy of a module that shares its parameters and buffers."""
    tensors = (*module.parameters(), *module.buffers())
    return copy.deepcopy(module, {id(t): t for t in tensors})


def _config(mode: str) -> Any:
    from torchao import quantization

    configs = {"int8": quantization.Int8WeightOnlyConfig, "w8a8": quantization.Int8DynamicActivationInt8WeightConfig}
    return configs[mode](set_inductor_config=False)  # do not change torch's global settings
