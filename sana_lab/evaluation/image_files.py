"""Image files as batches of one size; unreadable ones are skipped, recorded and bounded in number."""

import warnings
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sana_lab.data.files import Files, listing
from sana_lab.data.images import UnreadableError, read
from sana_lab.types import Json

TOLERATED = 0.05
"""Share of a folder's files that may be skipped."""


class ImageFile(NamedTuple):
    """One image to read."""

    path: Path
    name: str  # in reports
    row: Json = {}  # noqa: RUF012 - never written to; {"prompt", ...}


class Skipped:
    """Skipped files, with reasons."""

    def __init__(self, folder: str | Path, tolerated: float = TOLERATED) -> None:
        self.folder, self.tolerated = str(folder), tolerated
        self.reasons: dict[str, str] = {}  # by name

    def add(self, name: str, reason: str, total: int) -> None:
        """Skip one of `total` files. ValueError as soon as more than the share `tolerated` is skipped."""
        self.reasons[name] = reason
        if len(self.reasons) > self.tolerated * total:
            shown = ", ".join(f"{name!r} ({why})" for name, why in list(self.reasons.items())[:5])
            share = f"{len(self.reasons)} of {total} files, more than {self.tolerated:.0%},"
            raise ValueError(
                f"{share} in {self.folder!r} cannot be measured: {shown}{', ...' if len(self.reasons) > 5 else ''}"
            )


def find_images(folder: str | Path) -> list[ImageFile]:
    """All image files below a folder, sorted by path; named by the path inside it. ValueError if there are none.

    Images that Pillow cannot read, links to nothing and the like are left out with a warning that names them.
    """
    files = Files(Path(folder))
    if not files.pictures:
        problem = "holds no image files" if files.root.is_dir() else "is no folder"
        left_out = f"; left out: {listing(files.skipped)}" if files.skipped else ""
        raise ValueError(f"{str(folder)!r} {problem}; expected files such as *.png or *.jpg{left_out}")
    if files.skipped:
        warnings.warn(f"{str(folder)!r}: left out {listing(files.skipped)}", stacklevel=2)
    return [ImageFile(files.root / name, name) for name in files.pictures]


def batches(
    files: Sequence[ImageFile], batch: int, skipped: Skipped, min_side: int = 1, total: int | None = None
) -> Iterator[tuple[Tensor, list[ImageFile]]]:
    """Images (B, 3, H, W) uint8, B at most `batch`, and their files; neighbours of one size share a batch.

    `total` is the number of files of which a share may be skipped, where these are a part of them.
    """
    readable = _readable(files, skipped, min_side, total or len(files))
    for _, same_size in groupby(readable, key=lambda pair: pair[0].shape):
        while part := list(islice(same_size, batch)):
            yield torch.stack([image for image, _ in part]), [file for _, file in part]


def read_uint8(path: Path) -> Tensor:
    """(3, H, W) uint8. UnreadableError."""
    return torch.from_numpy(np.array(read(path))).permute(2, 0, 1)


def _readable(
    files: Sequence[ImageFile], skipped: Skipped, min_side: int, total: int
) -> Iterator[tuple[Tensor, ImageFile]]:
    for file in files:
        try:
            image = read_uint8(file.path)
        except UnreadableError as error:
            skipped.add(file.name, str(error), total)
            continue
        height, width = image.shape[1:]
        if min(height, width) < min_side:
            skipped.add(file.name, f"{width}x{height}, below the {min_side} pixels a side needed", total)
        else:
            yield image, file
