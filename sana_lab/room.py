"""What fits in a device's memory: `bench --memory` says it before, and an error that memory is full says it after."""

import json
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from sana_lab import config
from sana_lab.diffusion.sampling import Sampling
from sana_lab.evaluation.flops import parameters
from sana_lab.evaluation.throughput import OutOfMemory, first_line, is_out_of_memory, release
from sana_lab.outputs import check_file
from sana_lab.parts import SpecError, build
from sana_lab.systems.costs import STAGES
from sana_lab.systems.memory import GIB, Counter, Peaks, Way
from sana_lab.systems.quantize import installed
from sana_lab.systems.stages import COMPONENT
from sana_lab.systems.text2image import TextToImage
from sana_lab.types import Json

CARDS = (8, 16)
"""GiB of memory of the cards that a table is about."""

OTHERS = 1.0
"""GiB left to CUDA's context, libraries' workspaces and what the allocator cannot use again: an allowance, not a number
that was measured."""

NOTES = (
    "computed, not measured on a GPU: bytes of live tensors, operator by operator, on the meta device; not the "
    "workspace inside an operator; kernels that fuse what is plain torch here hold less",
    "prompts as long as the text encoder reads, guidance in one batched forward; decoded to 8-bit images",
    "weights: of the autoencoder, encoder included; with offload each stage has its own network alone",
    f"room: what a card has left, {OTHERS:g} GiB set aside for CUDA's context, workspaces and the allocator",
)


def main(experiment: Json, *, size: int | None, batch: int, json_file: Path | None) -> None:
    """`sana-lab bench EXPERIMENT --memory`: print the table, and write it to `json_file`."""
    check_file(json_file)
    record = computed(experiment, size, batch)
    print(table(record))
    if json_file is not None:
        json_file.write_text(json.dumps(record, indent=2) + "\n")


def computed(experiment: Json, size: int | None = None, batch: int = 1) -> Json:
    """The memory of drawing by a resolved experiment's system, in the dtype that it has on a GPU, as plain data."""
    system = _shape_of(experiment)
    size = size or config.image_size(experiment["data"])
    counter = Counter(system, size, batch, Sampling(**experiment["sampling"]).guidance != 1)
    ways, missing = _ways(counter)
    return {
        "size": size,
        "batch": batch,
        "dtype": str(next(system.dit.parameters()).dtype).removeprefix("torch."),
        "components": _components(system, ways),
        "ways": {name: _row(peaks) for name, peaks in ways.items()},
        "notes": [*NOTES, *missing],
    }


def table(record: Json) -> str:
    """The record for a reader, in GiB."""
    title = "{0}x{0} pixels, batch {1}, {2}; GiB; computed, not measured on a GPU".format(
        *(record[k] for k in ("size", "batch", "dtype"))
    )
    parts = [f"{'component':<14}{'params M':>10}" + "".join(f"{k:>10}" for k in ("weights", "int8", "w8a8"))]
    for name, one in record["components"].items():
        weights = "".join(f"{_gib(one.get(k)):>10}" for k in ("weights", "int8", "w8a8"))
        parts.append(f"{name:<14}{one['params_m']:>10.1f}{weights}")
    head = f"{'way':<34}" + "".join(f"{k:>9}" for k in (*STAGES, "peak")) + "".join(f"{f'of {c}':>9}" for c in CARDS)
    rows = [f"{name:<34}" + "".join(f"{_gib(v):>9}" for v in _shown(way)) for name, way in record["ways"].items()]
    return "\n".join([title, *parts, head, *rows, *(f"- {note}" for note in record["notes"])])


def _shown(way: Json) -> list[float]:
    return [*(way[stage] for stage in STAGES), way["peak"], *(way["room"][str(card)] for card in CARDS)]


def _gib(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _shape_of(experiment: Json) -> TextToImage:
    """The experiment's system on the meta device, in the dtype of drawing on a GPU."""
    spec = experiment["system"]
    if not all(isinstance(spec.get(name), dict) for name in COMPONENT.values()):
        raise SpecError(f"memory is that of drawing by a text2image system; this experiment trains {spec['name']!r}")
    half = {"bf16": torch.bfloat16, "16-": torch.float16}
    dtype = next((d for p, d in half.items() if experiment["trainer"]["precision"].startswith(p)), torch.float32)
    with torch.device("meta"):
        return build("system", spec).to(dtype).eval()


def _ways(counter: Counter) -> tuple[dict[str, Peaks], list[str]]:
    """Each saving on top of the one before, and W8A8 in place of int8; without torchao those that need none."""
    tile = quarter(counter)
    ways = {
        "all on the device": Way(),
        "+ offload": Way(offload=True),
        f"+ tiled decode, tile={tile}": Way(offload=True, tile=tile),
        "+ int8": Way("int8", True, tile),
        "+ w8a8 in its place": Way("w8a8", True, tile),
        f"tile={tile} alone": Way(tile=tile),
        "int8 alone": Way("int8"),
        f"int8, tile={tile}, no offload": Way("int8", tile=tile),
    }
    found, missing = {}, []
    for name, way in ways.items():
        try:
            found[name] = counter.peaks(way)
        except ImportError as error:
            missing = [f"left out: {error}"]
    return found, missing


def quarter(counter: Counter) -> int:
    """A tile of a quarter of the latents' side."""
    return max(1, max(counter.shape[-2:]) // 4)


def _components(system: TextToImage, ways: dict[str, Peaks]) -> Json:
    plain = ways["all on the device"].weights
    rounded = {"int8": "+ int8", "w8a8": "+ w8a8 in its place"}
    found: Json = {
        name: {"params_m": parameters(getattr(system, name))["total"] / 1e6, "weights": plain[name] / GIB}
        for name in COMPONENT.values()
    }
    found["dit"] |= {how: ways[row].weights["dit"] / GIB for how, row in rounded.items() if row in ways}
    return found


def _row(peaks: Peaks) -> Json:
    return {
        **{stage: peaks.stage(stage) / GIB for stage in STAGES},
        "peak": peaks.total / GIB,
        "work": {stage: held / GIB for stage, held in peaks.work.items()},
        "room": {str(card): card - OTHERS - peaks.total / GIB for card in CARDS},
    }


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
