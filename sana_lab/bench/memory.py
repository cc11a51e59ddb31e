"""What drawing takes of a device's memory, by component and by stage, worked out without the device.

Every operator runs on the meta device, and the bytes of all live tensors are followed: weights, inputs and results, not
the workspace inside one operator. Kernels that fuse what runs here in plain torch hold less.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sana_lab.bench.record import STAGES, mib_of, weights_of
from sana_lab.bench.stages import COMPONENT
from sana_lab.costs.live_memory import LiveBytes
from sana_lab.diffusion.sampling import Sampling
from sana_lab.models.dit import Dit, Quantize
from sana_lab.models.layers import dtype_of
from sana_lab.models.text import TextEncoder
from sana_lab.systems.offload import Offload
from sana_lab.systems.quantize import quantized
from sana_lab.systems.text2image import TextToImage
from sana_lab.types import Text

GIB = 2**30


class Way(NamedTuple):
    """How images are drawn, as far as memory goes."""

    quantize: Quantize = "none"
    offload: bool = False
    tile: int | None = None  # latents on the side of a tile that is decoded at a time; None decodes all at once


class Peaks(NamedTuple):
    """Bytes: weights by component, and by stage what is held beside them at its worst moment."""

    weights: dict[str, int]
    work: dict[str, int]
    offload: bool

    def stage(self, name: str) -> int:
        """All that is on the device in a stage at its worst moment."""
        held = self.weights[COMPONENT[name]] if self.offload else sum(self.weights.values())
        return held + self.work[name]

    @property
    def total(self) -> int:
        return max(map(self.stage, self.work))


def measured(system: TextToImage, way: Way, size: int | tuple[int, int], batch: int = 1, device: str = "cuda") -> int:
    """Bytes at the worst moment of drawing so on a GPU, by its allocator; two steps stand for all, launched one by one,
    as recorded steps keep memory of their own. The system is settled there, and stays so."""
    how = Sampling(steps=2, quantize=way.quantize, offload=way.offload, graph="never")
    system.autoencoder.tile = way.tile
    system.settle(how, device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    with _silent(system.text_encoder):
        system.sample(_long(system.text_encoder, batch), size=size, sampling=how)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


class Counter:
    """Counts for one system, size and batch; each stage once for all ways that share it. No tensor is changed."""

    def __init__(self, system: TextToImage, size: int | tuple[int, int], batch: int, guided: bool) -> None:
        self.system, self.batch, self.rows = system, batch, batch * (2 if guided else 1)
        self.shape = (batch, *system.latent_shape(size))
        self.guided = guided
        self._known: dict[Any, tuple[int, int]] = {}

    def peaks(self, way: Way) -> Peaks:
        """ImportError where it is quantised and torchao is not installed."""
        found = {
            "text": self._once("text", self._text),
            "denoise": self._once(way.quantize, lambda: self._denoise(way.quantize)),
            "decode": self._once(("decode", way.tile), lambda: self._decode(way.tile)),
        }
        weights = {COMPONENT[stage]: found[stage][0] for stage in STAGES}
        return Peaks(weights, {stage: found[stage][1] for stage in STAGES}, way.offload)

    def _once(self, key: Any, count: Callable[[], tuple[int, int]]) -> tuple[int, int]:
        if key not in self._known:
            self._known[key] = count()
        return self._known[key]

    def _text(self) -> tuple[int, int]:
        """Prompts as long as the encoder reads, and the empty one where guidance needs it."""
        encoder = self.system.text_encoder
        prompts = _long(encoder, self.batch)

        def read() -> Any:
            text = encoder(prompts)
            return text, encoder.negative([""], text) if self.guided else None

        with Offload("meta").visit(encoder), _silent(encoder), _unasked(encoder):
            return _bytes(encoder, read)

    def _denoise(self, how: Quantize) -> tuple[int, int]:
        with Offload("meta").visit(self.system.dit), torch.device("meta"):
            dit = quantized(self.system.dit, how)
            text = self._features(dit)
            x, t = torch.empty(self.rows, *self.shape[1:]), torch.empty(self.rows)
            return _bytes(dit, lambda: dit.prepare(text)(x, t))

    def _features(self, dit: Dit) -> Text:
        length = self.system.text_encoder.max_tokens
        tokens = torch.empty(self.rows, length, dit.text_dim, dtype=dtype_of(dit))
        return Text(tokens, torch.ones(self.rows, length, dtype=torch.bool))

    def _decode(self, tile: int | None) -> tuple[int, int]:
        autoencoder, before = self.system.autoencoder, self.system.autoencoder.tile
        autoencoder.tile = tile
        try:
            with Offload("meta").visit(autoencoder):
                latents = torch.empty(self.shape, device="meta")
                return _bytes(autoencoder, lambda: self.system.pixels(latents))
        finally:
            autoencoder.tile = before


def _long(encoder: TextEncoder, batch: int) -> list[str]:
    """Prompts of as many tokens as are read."""
    return ["red circle " * encoder.max_tokens] * batch


@contextmanager
def _silent(encoder: Any) -> Iterator[None]:
    """Nothing is said of prompts that are cut: they are so on purpose."""
    warnings_left, encoder.warnings_left = encoder.warnings_left, 0
    try:
        yield
    finally:
        encoder.warnings_left = warnings_left


@contextmanager
def _unasked(encoder: torch.nn.Module) -> Iterator[None]:
    """Networks of transformers get a mask (B, 1, L, L): of none, or (B, L), they ask what it holds, which meta tensors
    cannot say."""

    def widen(_: Any, args: Any, kwargs: Any) -> Any:
        mask, ids = kwargs.get("attention_mask"), kwargs["input_ids"]
        rows, length = ids.shape
        known = mask is not None and mask.ndim == 4
        return args, kwargs | {"attention_mask": mask if known else ids.new_ones(rows, 1, length, length).bool()}

    networks = [m for m in encoder.modules() if hasattr(m, "config") and hasattr(m, "get_input_embeddings")]
    hooks = [m.register_forward_pre_hook(widen, with_kwargs=True) for m in networks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _bytes(network: torch.nn.Module, call: Callable[[], Any]) -> tuple[int, int]:
    """(weights, what the call holds beside them at its worst moment), of a network on the meta device."""
    held: list[Tensor] = weights_of([network])
    weights = round(mib_of(held) * 2**20)
    with LiveBytes(held, "meta") as seen:
        call()
    return weights, seen.resident - weights + seen.peak
