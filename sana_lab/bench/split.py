"""A network on the meta device split into units, such as its blocks, and the rest; each can be allocated alone.

The rest runs with units that return a tensor of the right shape at once, without writing to it. That run also records
the arguments of every unit, so that a unit alone gets arguments of the same shapes, with random values.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from sana_lab.costs.fused_attention import fused_attention
from sana_lab.costs.live_memory import LiveBytes, module_tensors, tensor_bytes
from sana_lab.costs.timing import Call

WEIGHT_SCALE = 0.02
"""Standard deviation of random weights; inputs have 1."""

PATTERN = 2**16 + 1
"""Random numbers that repeat in a tensor: drawing all of a large block takes longer than running it."""

DECODER_UNITS = {"ResBlock", "EfficientViTBlock", "AttentionBlock", "Upsample", "ResnetBlock2D", "Upsample2D"}
"""Classes of the blocks that stages of an autoencoder's decoder consist of, here and in diffusers."""


class Unit(NamedTuple):
    """Units of equal shapes, called with equal shapes."""

    module: nn.Module  # one of them
    args: tuple[Any, ...]  # templates
    kwargs: dict[str, Any]
    calls: int  # of all of them in one call of the network
    key: str

    @contextmanager
    def allocate(self, device: torch.device, dtype: torch.dtype) -> Iterator[Call]:
        """A call of the unit with random weights and arguments, which exist within the context."""
        with allocated(self.module.modules(), device, dtype):
            args, kwargs = tree_map(partial(materialise, device=device), (self.args, self.kwargs))
            yield lambda: self.module(*args, **kwargs)

    def bytes(self) -> int:
        """Weights, inputs and live tensors of a call, by a run on the meta device."""
        args, kwargs = tree_map(on_meta, (self.args, self.kwargs))
        with torch.no_grad(), LiveBytes(module_tensors([self.module]), "meta") as live, fused_attention():
            self.module(*args, **kwargs)
        return live.resident + live.peak


def repeated_modules(network: nn.Module) -> list[nn.Module]:
    """The elements of the outermost lists of modules, such as a transformer's blocks."""
    units: list[nn.Module] = []
    for child in network.children():
        units += list(child) if isinstance(child, nn.ModuleList) else repeated_modules(child)
    return units


def decoder_units(decoder: nn.Module) -> list[nn.Module]:
    """The blocks of a decoder's stages, in order; empty if it consists of others."""
    units: list[nn.Module] = []
    for child in decoder.children():
        name = type(child).__name__
        attention = name == "Attention"  # in the middle of diffusers' decoders
        units += [child] if attention or name in DECODER_UNITS else decoder_units(child)
    return units


def rest_of(network: nn.Module, units: Iterable[nn.Module]) -> list[nn.Module]:
    """The network's modules outside of the units."""
    inside = {id(module) for unit in units for module in unit.modules()}
    return [module for module in network.modules() if id(module) not in inside]


class Split:
    """A network of units and the rest. `call` runs the network, `rest` are modules that are allocated for it."""

    def __init__(self, call: Call, units: Iterable[nn.Module], rest: Iterable[nn.Module]) -> None:
        self.call, self.units, self.rest = call, list(units), list(rest)
        self.recorded: dict[str, Unit] = {}
        self.outputs: dict[str, Any] = {}
        self.descriptions: dict[int, str] = {}

    def record(self, device: torch.device, dtype: torch.dtype) -> list[Unit]:
        """Run the rest once; the units that it calls."""
        self.recorded = {}
        with self.allocate(device, dtype) as call, torch.no_grad():
            call()
        return [*self.recorded.values()]

    @contextmanager
    def allocate(self, device: torch.device, dtype: torch.dtype) -> Iterator[Call]:
        """A call of the network whose units return at once, with random weights of the rest."""
        with allocated(self.rest, device, dtype), ExitStack() as stack:
            for unit in self.units:
                stack.enter_context(_replaced(unit, partial(self._stub, unit, unit.forward)))
            yield self.call

    def key(self) -> str:
        """Equal for networks whose rest has equal modules."""
        return _digest([_describe(module, recurse=False) for module in self.rest])

    def bytes(self) -> int:
        """Weights of the rest, and three times the largest output of a unit recorded: input, result and one between."""
        weights = sum(tensor_bytes(_own_tensors(m)) for m in self.rest if not isinstance(m, nn.Embedding))
        outputs = [tensor_bytes([x]) for x in tree_leaves(self.outputs) if isinstance(x, Tensor)]
        return weights + 3 * max(outputs, default=0)

    def _stub(self, unit: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        shapes = repr(tree_map(_shape, (args, kwargs)))
        key = _digest([self._description(unit), shapes])
        if key not in self.outputs:
            inputs = (args, kwargs) if _is_allocated(unit) else tree_map(on_meta, (args, kwargs))
            with fused_attention():
                self.outputs[key] = tree_map(on_meta, forward(*inputs[0], **inputs[1]))
        if key in self.recorded:
            self.recorded[key] = self.recorded[key]._replace(calls=self.recorded[key].calls + 1)
        else:
            positional, keywords = tree_map(template, (args, kwargs))
            self.recorded[key] = Unit(unit, positional, keywords, 1, key)
        first = next(x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        return tree_map(partial(_unwritten, like=first), self.outputs[key])

    def _description(self, unit: nn.Module) -> str:
        if id(unit) not in self.descriptions:
            self.descriptions[id(unit)] = _describe(unit, recurse=True)
        return self.descriptions[id(unit)]


@contextmanager
def allocated(modules: Iterable[nn.Module], device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Within the context these modules' own parameters and buffers are on the device, random; then as before.

    Tables of embeddings are not written, so that the host has memory only for the rows that are read.
    """
    before: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module in modules:
            stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for store in stores:
                for name, value in store.items():
                    if value is not None:
                        before.append((store, name, value))
                        store[name] = _weight(module, value, device, dtype)
        yield
    finally:
        for store, name, value in before:
            store[name] = value


def random_tensor(shape: Iterable[int], device: torch.device, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Normal numbers, the same PATTERN of them again and again."""
    out = torch.empty(tuple(shape), device=device, dtype=dtype)
    flat = out.view(-1)
    base = (scale * torch.randn(PATTERN, generator=torch.Generator().manual_seed(0), device="cpu")).to(device, dtype)
    whole = len(flat) // PATTERN * PATTERN
    flat[:whole].view(-1, PATTERN).copy_(base)
    flat[whole:].copy_(base[: len(flat) - whole])
    return out


def template(value: Any) -> Any:
    """A float tensor as one on the meta device with its strides; other tensors, such as masks, and all else as is."""
    return on_meta(value) if isinstance(value, Tensor) and value.is_floating_point() else value


def materialise(value: Any, device: torch.device) -> Any:
    """A tensor of random numbers for a template; all else as is."""
    if not isinstance(value, Tensor) or not value.is_meta:
        return value
    size = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) if value.numel() else 0
    return random_tensor((size,), device, value.dtype).as_strided(value.shape, value.stride())


def on_meta(value: Any) -> Any:
    """A tensor's shape, strides and type on the meta device; all else as is."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _weight(module: nn.Module, value: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    if not value.is_floating_point():
        tensor = torch.zeros(value.shape, dtype=value.dtype, device=device)
    elif not isinstance(value, nn.Parameter):
        tensor = torch.ones(value.shape, dtype=dtype, device=device)
    elif isinstance(module, nn.Embedding):
        tensor = torch.empty(value.shape, dtype=dtype, device=device)
    else:
        tensor = random_tensor(value.shape, device, dtype, WEIGHT_SCALE)
    return nn.Parameter(tensor, requires_grad=False) if isinstance(value, nn.Parameter) else tensor


def _unwritten(value: Any, like: Tensor) -> Any:
    """A tensor of a template's shape on the device of `like`, in its memory format; writing it would take time that is
    the unit's."""
    if not isinstance(value, Tensor):
        return value
    out = torch.empty(value.shape, dtype=like.dtype if value.is_floating_point() else value.dtype, device=like.device)
    last = value.ndim == 4 == like.ndim and like.is_contiguous(memory_format=torch.channels_last)
    if last and not like.is_contiguous():
        rows, channels, height, width = value.shape
        return out.view(rows, height, width, channels).permute(0, 3, 1, 2)
    return out


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the context a module has another forward."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _is_allocated(module: nn.Module) -> bool:
    return not any(tensor.is_meta for tensor in module.parameters())


def _own_tensors(module: nn.Module) -> list[Tensor]:
    return [value for store in (module._parameters, module._buffers) for value in store.values() if value is not None]


def _describe(module: nn.Module, recurse: bool) -> str:
    """Classes, shapes and plain options of a module, and of those inside, without their places in the network."""
    lines = []
    for name, inner in module.named_modules() if recurse else [("", module)]:
        plain = {k: v for k, v in vars(inner).items() if isinstance(v, int | float | str) and k[0] != "_"}
        options = {k: v for k, v in sorted(plain.items()) if k != "training" and not k.endswith(("idx", "index"))}
        shapes = {k: tuple(v.shape) for k, v in [*inner._parameters.items(), *inner._buffers.items()] if v is not None}
        lines.append(f"{name} {type(inner).__name__} {options} {shapes}")
    return "\n".join(lines)


def _shape(value: Any) -> Any:
    return (tuple(value.shape), str(value.dtype)) if isinstance(value, Tensor) else value


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:20]
