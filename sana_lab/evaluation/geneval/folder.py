"""Images in GenEval's own layout, `00000/metadata.jsonl` and `00000/samples/0000.png`, written and judged."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sana_lab.config.specs import nearest
from sana_lab.data import images as pictures
from sana_lab.evaluation import Report
from sana_lab.evaluation.geneval import rule
from sana_lab.evaluation.geneval.measure import GenEval
from sana_lab.types import Json

METADATA, SAMPLES = "metadata.jsonl", "samples"


class Prompted(NamedTuple):
    """One numbered folder: a row and the files of its images."""

    row: Json
    images: list[Path]


def write(folder: Path, index: int, row: Json, images: Tensor) -> None:
    """Put the images (B, 3, H, W) uint8 of the row at that position where GenEval's own script looks for them."""
    inside = folder / f"{index:05d}"
    (inside / SAMPLES).mkdir(parents=True, exist_ok=True)
    (inside / METADATA).write_text(json.dumps(row) + "\n", encoding="utf-8")
    for k, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(inside / SAMPLES / f"{k:04d}.png")


def read(folder: Path) -> list[Prompted]:
    """What the numbered folders hold, in order, and no other. ValueError names what is missing or broken."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {str(folder)!r}; {nearest(folder.name, _folders(folder.parent))}")
    numbered = sorted((p for p in folder.iterdir() if p.is_dir() and p.name.isdigit()), key=lambda p: int(p.name))
    if not numbered:
        raise ValueError(f"{folder} has no numbered folders (00000, 00001 ...), expected GenEval's layout")
    return [Prompted(_row(inside / METADATA), _images(inside / SAMPLES)) for inside in numbered]


def score_folder(folder: Path, measure: GenEval) -> Report:
    """What the measure says of the images in a folder; a part of its rows is reported as partial.

    Everything is checked before the first image is judged. ValueError names the folder, the row or the file.
    """
    given = read(folder)
    for prompted in given:
        measure.match(prompted.row)
    for prompted in given:
        for image in _opened(prompted):
            measure.add(image[None], [prompted.row])
    return measure.report()


def _folders(parent: Path) -> list[str]:
    return [p.name for p in parent.glob("*/")]


def _row(path: Path) -> Json:
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not one line of JSON: {error}") from error
    if wrong := rule.fault(row):
        raise ValueError(f"{path}: {wrong}; given {row!r:.200}")
    return row


def _images(samples: Path) -> list[Path]:
    found = sorted(p for p in samples.glob("*.png") if re.fullmatch(r"\d+\.png", p.name))
    if not found:
        raise ValueError(f"{samples} holds no images called 0000.png, 0001.png ...")
    for path in found:
        try:
            pictures.dimensions(path)
        except pictures.UnreadableError as error:
            raise ValueError(f"{path} is broken: {error}") from error
    return found


def _opened(prompted: Prompted) -> Iterator[Tensor]:
    """uint8 (3, H, W) each."""
    for path in prompted.images:
        try:
            yield torch.from_numpy(np.array(pictures.read(path))).permute(2, 0, 1)
        except pictures.UnreadableError as error:
            raise ValueError(f"{path} is broken: {error}") from error
