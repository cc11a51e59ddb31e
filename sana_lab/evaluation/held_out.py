"""Held-out data of an evaluation: captions for measures without prompts, real images to compare with."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import Tensor

from sana_lab.data import DataModule
from sana_lab.data.folder import Folder
from sana_lab.evaluation.reconstruction import to_uint8
from sana_lab.types import Batch, Json


class HeldOut(NamedTuple):
    """Real images with captions, not trained on."""

    captions: list[Json]  # {"prompt"}; of a picture without a caption {"prompt": "", "image": its name}
    real_images: Callable[[], Iterable[Tensor]] | None  # each call iterates over uint8 batches (B, 3, H, W)
    reference: Json  # how many real images, of how many, from where, and their size


def held_out(data: DataModule, options: Json) -> HeldOut:
    """Up to `eval.held_out` of a data module's held-out images; the images are read lazily."""
    data.setup("validate")
    n = min(options["held_out"], data.len_val)
    chunks = _chunks(n, options["batch"])
    captions = [{"prompt": prompt} for chunk in chunks for prompt in data.prompts_at(chunk, "val")]
    real_images = (lambda: (_images(data.batch_at(chunk, "val")) for chunk in chunks)) if chunks else None
    return HeldOut(captions, real_images, {"origin": "held-out data", "n": n, "of": data.len_val, "size": data.size})


def folder_data(options: Json, size: int) -> HeldOut:
    """The folder `eval.captions` at that size; empty without one. Pictures without a caption count too."""
    if not options["captions"]:
        return HeldOut([], None, {})
    data = Folder(options["captions"], caption="", size=size, held_out=0)
    data.setup("fit")
    n = min(options["held_out"], data.len_train)
    names = [entry.name for entry in data.index.train[:n]]
    captions: list[Json] = [
        {"prompt": prompt} if prompt else {"prompt": "", "image": name}
        for prompt, name in zip(data.prompts_at(range(n)), names, strict=True)
    ]
    reference = {"origin": options["captions"], "n": n, "of": data.len_train, "size": size}
    chunks = _chunks(n, options["batch"])
    return HeldOut(captions, lambda: (_images(data.batch_at(chunk)) for chunk in chunks), reference)


def _images(batch: Batch) -> Tensor:
    """(B, 3, H, W) uint8. ValueError for data of latents only."""
    if batch.images is None:
        raise ValueError("measures compare with images; this data yields latents only")
    return to_uint8(batch.images)


def _chunks(n: int, batch: int) -> list[range]:
    return [range(i, min(i + batch, n)) for i in range(0, n, batch)]
