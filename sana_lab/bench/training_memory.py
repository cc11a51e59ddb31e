"""Peak memory of a training on one device, computed by stage: pictures, the frozen encoder's pass over them, and steps.

Activations are counted on the meta device, operator by operator, without the workspace inside one. On the CPU the
process itself counts too: Python and the libraries, as large as in the process that asks.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sana_lab.bench.memory import MemoryCounter, MemoryOptions
from sana_lab.checkpoints.build import build_on_meta, without_weights
from sana_lab.config import experiments
from sana_lab.config.memo import reuse
from sana_lab.config.schema import Config
from sana_lab.costs.fused_attention import fused_attention
from sana_lab.costs.live_memory import LiveBytes, module_tensors, tensor_bytes
from sana_lab.costs.too_large import GIB
from sana_lab.diffusion.guidance import reads_null
from sana_lab.diffusion.sampling import Sampling

TRAINING_BYTES = 20
"""Bytes per trained parameter: float32 weights, gradients, two moments of Adam, and the averaged weights (EMA)."""

MOMENTS = 8
"""Of these, the two moments of Adam."""

COMPACT = {"adamw_8bit": 2, "came": 4, "came in 8 bits": 1}
"""Bytes of an optimiser's state in place of Adam's moments, per value of a large matrix."""

BUILT_BYTES = 8
"""Of these, those of a system that has not made a step: weights and average."""

ENCODED_PIXELS = 2**22
"""Pixels that a data set of latents encodes at a time, and one image at least."""

MLFLOW_BYTES = 180 * 2**20
"""Of the import of MLflow 3.17, as measured on Linux."""

PREFETCHED = 2
"""Batches that exist at a time: Lightning takes one in advance."""


class TrainingMemory(NamedTuple):
    """Bytes at the peak of each stage of a training."""

    process: int  # Python and libraries, of a training on the CPU; 0 on a GPU
    state: int  # trained weights with gradients, optimiser state and average, and frozen weights
    step: int  # activations, and the batches
    encoding: int  # before the first step, where latents are cached: all but the process

    @property
    def fixed(self) -> int:
        """What does not depend on the batch."""
        return self.process + self.state

    @property
    def peak(self) -> int:
        """Of all stages."""
        return self.process + max(self.encoding, self.state + self.step)

    def line(self) -> str:
        """The parts in words."""
        parts = {
            "Python and libraries": self.process,
            "weights, gradients, optimiser and average": self.state,
            "activations and batches": self.step,
            "encoding of the data before the first step, in place of both": self.encoding,
        }
        return ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)


def training_memory(experiment: Config, system: Any, batch: int, activations: int, devices: int = 1) -> TrainingMemory:
    """The memory of each of `devices`, whose share of a batch are `batch` images with so many bytes of activations."""
    data, trainer = experiment["data"], experiment["trainer"]
    size, cpu = experiments.image_size(data), on_cpu(trainer["accelerator"])
    trained = sum(p.numel() for p in system.parameters() if p.requires_grad)
    frozen = (
        tensor_bytes(t for t in module_tensors([system]) if not t.requires_grad)
        * frozen_weight_bytes(trainer["precision"])
        // 4
    )
    shards = devices if trainer["strategy"] == "fsdp2" else 1
    state = training_bytes(experiment["system"]) * trained // shards + frozen
    cached = [spec for spec in chain(data) if "autoencoder" in spec]
    if cached:
        batches = PREFETCHED * batch * _latent_bytes(cached[0], size)
        encoding = BUILT_BYTES * trained + _encoding(cached[0]["autoencoder"], size)
        return TrainingMemory(_training_process() if cpu else 0, state, activations + batches, encoding)
    encoder: Any = system.part("autoencoder")
    if encoder is not None and system.part("dit") is not None:  # frozen, in each step
        encoded = reuse(("encode", encoder.spec, batch, size), lambda: _encode(encoder, batch, size))
        activations = max(activations, encoded)
    pictures = PREFETCHED * batch * 12 * size**2
    return TrainingMemory(_training_process() if cpu else 0, state, activations + pictures, 0)


def training_bytes(system: Config) -> int:
    """Bytes per trained parameter with the optimiser of a system's spec."""
    optimizer = system.get("optimizer")
    spec = optimizer if isinstance(optimizer, dict) else {"name": optimizer}
    name = f"{spec['name']} in 8 bits" if spec.get("bits") == 8 else spec["name"]
    return TRAINING_BYTES - MOMENTS + COMPACT.get(str(name), MOMENTS)


def sampling_lines(experiment: Config) -> list[str]:
    """The memory of sampling an image of the training's size by what is trained, in words; none without a DiT."""
    spec, sampling = experiment["system"], Sampling(**experiment["sampling"])
    parts = {kind: spec[kind] for kind in ("dit", "autoencoder", "text_encoder") if isinstance(spec.get(kind), dict)}
    if len(parts) < 3:
        return []
    whole: Any = build_on_meta("system", {"name": "text2image", **parts, "dit": without_weights(parts["dit"])}).eval()
    size, tile = experiments.image_size(experiment["data"]), whole.autoencoder.tile
    counter = MemoryCounter(whole, size, 1, reads_null(whole.dit, sampling.guidance))
    peak = counter.peak(MemoryOptions("none", sampling.offload, tile)).total
    process = process_bytes() if on_cpu(experiment["trainer"]["accelerator"]) else 0
    decoded = "decoded whole" if tile is None else f"decoded in tiles of {tile} latents"
    of_it = f" (of it Python and libraries {process / GIB:.2f})" if process else ""
    return [f"memory of sampling an image of {size} px, {decoded}: {(process + peak) / GIB:.2f} GiB{of_it}"]


def chain(data: Config) -> Iterator[Config]:
    """A data spec, the one that it is made of, and so on."""
    yield data
    if isinstance(source := data.get("source"), dict):
        yield from chain(source)


def frozen_weight_bytes(precision: str) -> int:
    """Bytes of a frozen weight."""
    return 2 if precision.endswith("true") and precision.startswith(("bf16", "16")) else 4


def on_cpu(accelerator: str) -> bool:
    """Whether a training uses the machine's own memory."""
    return accelerator == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())


def _training_process() -> int:
    """Of Python and the libraries of a training, which imports MLflow too."""
    return process_bytes() + (0 if "mlflow" in sys.modules else MLFLOW_BYTES)


def process_bytes() -> int:
    """Resident bytes of this process; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    import resource

    return pages * resource.getpagesize()


def _latent_bytes(spec: Config, size: int) -> int:
    """Of one cached image."""
    encoder = spec["autoencoder"]
    autoencoder: Any = reuse(("encoder", encoder), lambda: build_on_meta("autoencoder", encoder))
    return int(4 * autoencoder.channels * (size // autoencoder.downsample) ** 2)


def _encoding(spec: Config, size: int) -> int:
    """Bytes of a frozen autoencoder, and of the most images that it encodes at a time."""
    autoencoder: Any = reuse(("encoder", spec), lambda: build_on_meta("autoencoder", spec))
    images = max(1, min(64, ENCODED_PIXELS // size**2))
    encoded = reuse(("encode", spec, images, size), lambda: _encode(autoencoder, images, size))
    read = (2 * images + 1) * 3 * size**2  # a picture, crops and their stack, 8 bits
    return tensor_bytes(module_tensors([autoencoder])) + images * 12 * size**2 + max(encoded, read)


def _encode(autoencoder: Any, images: int, size: int) -> int:
    """Peak bytes of the activations of encoding."""
    dtype = next((parameter.dtype for parameter in autoencoder.parameters()), torch.float32)
    pixels = torch.empty(images, 3, size, size, device="meta", dtype=dtype)
    return _peak(autoencoder, lambda: autoencoder.eval().encode(pixels))


@torch.no_grad()
def _peak(network: Any, call: Callable[[], Tensor]) -> int:
    with fused_attention(), LiveBytes(module_tensors([network]), "meta") as live:
        call()
    return live.peak
