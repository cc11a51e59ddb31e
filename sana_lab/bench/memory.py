"""Peak memory of sampling by component and stage, computed without the device.

Every operator runs on the meta device while the bytes of all live tensors are tracked: weights, inputs and results, not
the workspace inside one operator. Fused kernels need less than the plain torch operators counted here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sana_lab.bench.record import COMPONENTS, STAGES
from sana_lab.checkpoints.build import build_on_meta
from sana_lab.config.specs import SpecError
from sana_lab.costs.flops import expanded_masks
from sana_lab.costs.live_memory import LiveBytes, module_tensors, tensor_bytes
from sana_lab.models.dit import Dit, Quantize
from sana_lab.models.layers import dtype_of
from sana_lab.models.text import TextEncoder
from sana_lab.systems.offload import Offload
from sana_lab.systems.quantize import quantized
from sana_lab.types import Json, Text

if TYPE_CHECKING:
    from sana_lab.systems.text2image import TextToImage

GIB = 2**30


class MemoryOptions(NamedTuple):
    """Sampling options that affect memory."""

    quantize: Quantize = "none"  # 8-bit weights of the denoiser
    offload: bool = False  # whether networks are on the device only while they run
    tile: int | None = None  # side of a decoded tile, in latents; None decodes the image whole


class PeakMemory(NamedTuple):
    """Peak memory in bytes: weights by component, and peak activations by stage."""

    weights: dict[str, int]
    activations: dict[str, int]
    offload: bool

    def stage(self, name: str) -> int:
        """Total bytes on the device at the peak of a stage."""
        weights = self.weights[COMPONENTS[name]] if self.offload else sum(self.weights.values())
        return weights + self.activations[name]

    @property
    def total(self) -> int:
        return max(map(self.stage, self.activations))


class MemoryCounter:
    """Peak memory for one system, size and batch; each stage is counted once for all options that share it.

    The system's tensors are not changed.
    """

    def __init__(self, system: "TextToImage", size: int | tuple[int, int], batch: int, guided: bool) -> None:
        self.system, self.batch, self.rows = system, batch, batch * (2 if guided else 1)
        self.shape = (batch, *system.latent_shape(size))  # (B, C, h, w)
        self.guided = guided
        self._counts: dict[Any, tuple[int, int]] = {}

    def peak(self, options: MemoryOptions) -> PeakMemory:
        """Peak memory with these options. ImportError if they quantise and torchao is not installed."""
        counts = {
            "text": self._count("text", self._text),
            "denoise": self._count(options.quantize, lambda: self._denoise(options.quantize)),
            "decode": self._count(("decode", options.tile), lambda: self._decode(options.tile)),
        }
        weights = {COMPONENTS[stage]: counts[stage][0] for stage in STAGES}
        return PeakMemory(weights, {stage: counts[stage][1] for stage in STAGES}, options.offload)

    @property
    def default_tile(self) -> int:
        """A tile of a quarter of the latents' longer side."""
        return max(1, max(self.shape[-2:]) // 4)

    def _count(self, key: Any, count: Callable[[], tuple[int, int]]) -> tuple[int, int]:
        if key not in self._counts:
            self._counts[key] = count()
        return self._counts[key]

    def _text(self) -> tuple[int, int]:
        """Prompts of the encoder's maximum length, and the empty prompt if guidance needs it."""
        encoder = self.system.text_encoder
        prompts = long_prompts(encoder, self.batch)

        def encode() -> Any:
            text = encoder(prompts)
            return text, encoder.negative([""], text) if self.guided else None

        with Offload("meta").visit(encoder), no_warnings(encoder), expanded_masks(encoder):
            return _bytes(encoder, encode)

    def _denoise(self, quantize: Quantize) -> tuple[int, int]:
        with Offload("meta").visit(self.system.dit), torch.device("meta"):
            dit = quantized(self.system.dit, quantize)
            text = self._features(dit)
            x, t = torch.empty(self.rows, *self.shape[1:]), torch.empty(self.rows)
            return _bytes(dit, lambda: dit.prepare(text, guidance=1.0 if dit.distilled else None)(x, t))

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


def meta_system(experiment: Json) -> "TextToImage":
    """A resolved experiment's system on the meta device, in the dtype of sampling on a GPU. SpecError if it is not a
    text2image system."""
    spec = experiment["system"]
    if not all(isinstance(spec.get(name), dict) for name in COMPONENTS.values()):
        raise SpecError(f"memory of sampling needs a text2image system; this experiment trains {spec['name']!r}")
    half = {"bf16": torch.bfloat16, "16-": torch.float16}
    dtype = next((d for p, d in half.items() if experiment["trainer"]["precision"].startswith(p)), torch.float32)
    return build_on_meta("system", spec).to(dtype).eval()


def long_prompts(encoder: TextEncoder, batch: int) -> list[str]:
    """`batch` prompts that fill the encoder's `max_tokens`."""
    return [encoder.prompts[0] if encoder.prompts else "red circle " * encoder.max_tokens] * batch


@contextmanager
def no_warnings(encoder: Any) -> Iterator[None]:
    """Suppress the encoder's warnings about truncated prompts."""
    warnings_left, encoder.warnings_left = encoder.warnings_left, 0
    try:
        yield
    finally:
        encoder.warnings_left = warnings_left


@torch.no_grad()
def _bytes(network: torch.nn.Module, call: Callable[[], Any]) -> tuple[int, int]:
    """(bytes of weights, peak bytes of all other tensors of the call), of a network on the meta device."""
    tensors: list[Tensor] = module_tensors([network])
    weights = tensor_bytes(tensors)
    with LiveBytes(tensors, "meta") as live:
        call()
    return weights, live.resident - weights + live.peak
