"""Advice for an out-of-memory error: which options would lower the peak, with their computed peaks."""

from typing import TYPE_CHECKING, NamedTuple

import torch

from sana_lab.bench.memory import GIB, MemoryCounter, MemoryOptions, meta_system
from sana_lab.bench.training_memory import training_bytes
from sana_lab.checkpoints.build import build_on_meta
from sana_lab.diffusion.guidance import reads_null
from sana_lab.diffusion.sampling import Sampling
from sana_lab.systems.quantize import installed
from sana_lab.types import Json

if TYPE_CHECKING:
    from sana_lab.systems.text2image import TextToImage


class SamplingPass(NamedTuple):
    """One batch of images that did not fit."""

    system: "TextToImage"
    size: int | tuple[int, int]  # pixels
    batch: int
    sampling: Sampling
    batch_option: str  # the option that sets the batch, such as "eval.batch"

    def advice(self) -> list[str]:
        """Options that need less memory, each with its computed peak; without numbers if a part cannot be counted."""
        try:
            counter = self._counter(self.batch)
            peak = counter.peak(self._options()).total
        except Exception:  # a user's own parts need not run on the meta device
            return [f"try {', '.join(self._option_names())}"]
        return [f"computed peak: {peak / GIB:.2f} GiB with the present options", *self._savings(counter, peak)]

    def _options(self) -> MemoryOptions:
        return MemoryOptions(self.sampling.quantize, self.system.offload is not None, self.system.autoencoder.tile)

    def _counter(self, batch: int) -> MemoryCounter:
        return MemoryCounter(self.system, self.size, batch, reads_null(self.system.dit, self.sampling.guidance))

    def _savings(self, counter: MemoryCounter, peak: int) -> list[str]:
        """The changes whose computed peak is below `peak`."""
        one = {f"{self.batch_option}=1": self._counter(1).peak(self._options()).total} if self.batch > 1 else {}
        changes = self._changes(counter.default_tile)
        peaks = one | {change: counter.peak(options).total for change, options in changes.items()}
        return [f"{change} {total / GIB:.2f} GiB" for change, total in peaks.items() if total < peak]

    def _changes(self, tile: int) -> dict[str, MemoryOptions]:
        options, tiled = self._options(), f"system.autoencoder.tile={tile}"
        changes = {tiled: options._replace(tile=tile)}
        if self._device_type() != "cpu":
            changes["sampling.offload=true"] = options._replace(offload=True)
            changes[f"sampling.offload=true with {tiled}"] = options._replace(offload=True, tile=tile)
        if options.quantize == "none" and installed():
            changes["sampling.quantize=int8"] = options._replace(quantize="int8")
        return changes

    def _device_type(self) -> str:
        """Type of the sampling device; for a system on the meta device, of the fastest available device."""
        device = (self.system.offload.device if self.system.offload else self.system.device).type
        return device if device != "meta" else "cuda" if torch.cuda.is_available() else "cpu"

    def _option_names(self) -> list[str]:
        offload = [] if self._device_type() == "cpu" else ["sampling.offload=true"]
        return [f"a smaller {self.batch_option}", "system.autoencoder.tile=8", *offload, "sampling.quantize=int8"]


def experiment_advice(experiment: Json, size: int, batch: int, batch_option: str) -> list[str]:
    """Advice for sampling by a resolved experiment's untrained system."""
    return SamplingPass(meta_system(experiment), size, batch, Sampling(**experiment["sampling"]), batch_option).advice()


def training_advice(experiment: Json) -> list[str]:
    """Advice for training: memory that does not depend on the batch, and options that reduce the rest."""
    batch, trainer = experiment["data"].get("batch") or 1, experiment["trainer"]
    half = f"data.batch={batch // 2} with trainer.accumulate={2 * trainer['accumulate']}"
    dit = experiment["system"].get("dit") or {}
    options = [half] if batch > 1 else []
    options += [] if dit.get("checkpointing", True) else ["system.dit.checkpointing=true"]
    options += ["trainer.precision=bf16-mixed"] if trainer["precision"] == "32-true" else []
    return [_training_state(experiment), f"try {', '.join(options) or 'a smaller network'}"]


def _training_state(experiment: Json) -> str:
    system = build_on_meta("system", experiment["system"])
    trained = sum(p.numel() for p in system.parameters() if p.requires_grad)
    gib = f"{training_bytes(experiment['system']) * trained / GIB:.2f} GiB"
    return f"computed: {gib} for weights, gradients, the optimiser's state and averaged weights, at any batch size"
