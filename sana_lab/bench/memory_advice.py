"""What fits in a device's memory: `bench --memory` says it before, and an error that memory is full says it after."""

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from sana_lab.bench.memory import GIB, Counter, Way
from sana_lab.bench.stages import COMPONENT
from sana_lab.checkpoints.build import build
from sana_lab.config.specs import SpecError
from sana_lab.costs.out_of_memory import OutOfMemory, first_line, is_out_of_memory, release
from sana_lab.diffusion.sampling import Sampling
from sana_lab.systems.quantize import installed
from sana_lab.systems.text2image import TextToImage
from sana_lab.types import Json


def _shape_of(experiment: Json) -> TextToImage:
    """The experiment's system on the meta device, in the dtype of drawing on a GPU."""
    spec = experiment["system"]
    if not all(isinstance(spec.get(name), dict) for name in COMPONENT.values()):
        raise SpecError(f"memory is that of drawing by a text2image system; this experiment trains {spec['name']!r}")
    half = {"bf16": torch.bfloat16, "16-": torch.float16}
    dtype = next((d for p, d in half.items() if experiment["trainer"]["precision"].startswith(p)), torch.float32)
    with torch.device("meta"):
        return build("system", spec).to(dtype).eval()


def quarter(counter: Counter) -> int:
    """A tile of a quarter of the latents' side."""
    return max(1, max(counter.shape[-2:]) // 4)


# When memory is full


@contextmanager
def advised(tips: Callable[[], Sequence[str]]) -> Iterator[None]:
    """An error that memory is full as OutOfMemory, in one line that ends with what would help."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        told = first_line(error) if isinstance(error, OutOfMemory) else f"out of memory: {first_line(error)}"
        traceback.clear_frames(error.__traceback__)
        release()
        raise OutOfMemory(f"{told.rstrip('.')}. {'; '.join(tips())}") from None


class Drawing(NamedTuple):
    """What was being drawn."""

    system: TextToImage
    size: int | tuple[int, int]
    batch: int
    sampling: Sampling
    batch_option: str  # what a person changes to draw fewer at a time

    def tips(self) -> list[str]:
        """What would take less memory, each with its computed peak where that can be computed."""
        try:
            counter = self._counter(self.batch)
            peak = counter.peaks(self._now()).total
        except Exception:  # parts of a guest's own need not run on the meta device; then the tips have no numbers
            return [f"try {', '.join(self._words())}"]
        return [f"computed peak: {peak / GIB:.2f} GiB as asked", *self._less(counter, peak)]

    def _now(self) -> Way:
        return Way(self.sampling.quantize, self.system.offload is not None, self.system.autoencoder.tile)

    def _counter(self, batch: int) -> Counter:
        return Counter(self.system, self.size, batch, self.sampling.guidance != 1)

    def _less(self, counter: Counter, peak: int) -> list[str]:
        """Those that do lower the peak."""
        one = {f"{self.batch_option}=1": self._counter(1).peaks(self._now()).total} if self.batch > 1 else {}
        found = one | {words: counter.peaks(way).total for words, way in self._changes(quarter(counter)).items()}
        return [f"{words} {total / GIB:.2f} GiB" for words, total in found.items() if total < peak]

    def _changes(self, tile: int) -> dict[str, Way]:
        now, tiled = self._now(), f"system.autoencoder.tile={tile}"
        found = {tiled: now._replace(tile=tile)}
        if self._place() != "cpu":
            found["sampling.offload=true"] = now._replace(offload=True)
            found[f"sampling.offload=true with {tiled}"] = now._replace(offload=True, tile=tile)
        if now.quantize == "none" and installed():
            found["sampling.quantize=int8"] = now._replace(quantize="int8")
        return found

    def _place(self) -> str:
        """The kind of device; a system on the meta device stands for one on the fastest."""
        place = (self.system.offload.device if self.system.offload else self.system.device).type
        return place if place != "meta" else "cuda" if torch.cuda.is_available() else "cpu"

    def _words(self) -> list[str]:
        offload = [] if self._place() == "cpu" else ["sampling.offload=true"]
        return [f"a smaller {self.batch_option}", "system.autoencoder.tile=8", *offload, "sampling.quantize=int8"]


def untrained(experiment: Json, size: int, batch: int, option: str) -> Drawing:
    """What is drawn by an experiment's system; `option` is what chooses the batch."""
    return Drawing(_shape_of(experiment), size, batch, Sampling(**experiment["sampling"]), option)


def training_tips(experiment: Json) -> list[str]:
    """What would take less memory of a training: its activations follow the batch, the rest is computed."""
    batch, trainer = experiment["data"].get("batch") or 1, experiment["trainer"]
    half = f"data.batch={batch // 2} with trainer.accumulate={2 * trainer['accumulate']}"
    dit = experiment["system"].get("dit") or {}
    tips = [half] if batch > 1 else []
    tips += [] if dit.get("checkpointing", True) else ["system.dit.checkpointing=true"]
    tips += ["trainer.precision=bf16-mixed"] if trainer["precision"] == "32-true" else []
    return [_held(experiment), f"try {', '.join(tips) or 'a smaller network'}"]


def _held(experiment: Json) -> str:
    """Of each number that trains float32 weights, gradients, two moments of Adam and the average: 20 bytes."""
    with torch.device("meta"):
        system = build("system", experiment["system"])
    trained = sum(p.numel() for p in system.parameters() if p.requires_grad)
    held = f"{20 * trained / GIB:.2f} GiB"
    return f"computed: {held} for weights, gradients, Adam's moments and the average, whatever the batch"
