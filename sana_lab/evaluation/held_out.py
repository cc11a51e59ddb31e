"""Held-out data of an evaluation: captions for measures without prompts, real images to compare with."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import Tensor

from sana_lab.config import specs
from sana_lab.data import DataModule
from sana_lab.evaluation.reconstruction import to_uint8
from sana_lab.types import Batch, Json


class HeldOut(NamedTuple):
    """Real images with captions, not trained on."""

    captions: list[Json]  # {"prompt"}
    real_images: Callable[[], Iterable[Tensor]] | None  # each call iterates over uint8 batches (B, 3, H, W)


def held_out(data: DataModule, options: Json) -> HeldOut:
    """Up to `eval.held_out` of a data module's held-out images; the images are read lazily."""
    data.setup("validate")
    chunks = _chunks(min(options["held_out"], data.len_val), options["batch"])
    captions = [{"prompt": prompt} for chunk in chunks for prompt in data.prompts_at(chunk, "val")]
    real_images = (lambda: (_images(data.batch_at(chunk, "val")) for chunk in chunks)) if chunks else None
    return HeldOut(captions, real_images)


def folder_data(options: Json, size: int) -> HeldOut:
    """The folder `eval.captions` at that size; empty without one."""
    if not options["captions"]:
        return HeldOut([], None)
    data: DataModule = specs.build("data", {"name": "folder", "root": options["captions"], "size": size, "held_out": 0})
    data.setup("fit")
    n = min(options["held_out"], data.len_train)
    captions = [{"prompt": prompt} for prompt in data.prompts_at(range(n))]
    return HeldOut(captions, lambda: (_images(data.batch_at(chunk)) for chunk in _chunks(n, options["batch"])))


def _images(batch: Batch) -> Tensor:
    """(B, 3, H, W) uint8. ValueError for data of latents only."""
    if batch.images is None:
        raise ValueError("measures compare with images; this data yields latents only")
    return to_uint8(batch.images)


def _chunks(n: int, batch: int) -> list[range]:
    return [range(i, min(i + batch, n)) for i in range(0, n, batch)]
