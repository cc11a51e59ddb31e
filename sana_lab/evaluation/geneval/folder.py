"""GenEval's folder layout: `00000/metadata.jsonl` and `00000/samples/0000.png` for each prompt."""

import json
import re
import warnings
from pathlib import Path
from typing import NamedTuple

from sana_lab.config import text_files
from sana_lab.config.specs import nearest
from sana_lab.data import images
from sana_lab.data.image_formats import is_image
from sana_lab.evaluation.geneval.prompts import row_error
from sana_lab.types import Json

METADATA, SAMPLES = "metadata.jsonl", "samples"


class PromptFolder(NamedTuple):
    """One numbered folder."""

    row: Json
    images: list[Path]


def is_geneval(folder: Path) -> bool:
    """Whether a folder has numbered folders with metadata."""
    return any(p.name.isdigit() and (p / METADATA).is_file() for p in folder.iterdir() if p.is_dir())


def read(folder: Path) -> list[PromptFolder]:
    """Rows and image files of the numbered folders, in order. ValueError names what is missing or unreadable."""
    if not folder.is_dir():
        names = [p.name for p in folder.parent.glob("*/")]
        raise ValueError(f"there is no folder {str(folder)!r}; {nearest(folder.name, names)}")
    numbered = sorted((p for p in folder.iterdir() if p.is_dir() and p.name.isdigit()), key=lambda p: int(p.name))
    if not numbered:
        raise ValueError(f"{folder} has no numbered folders (00000, 00001 ...), expected GenEval's layout")
    return [PromptFolder(_row(inside / METADATA), _images(inside / SAMPLES)) for inside in numbered]


def _row(path: Path) -> Json:
    try:
        row = json.loads(text_files.read(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not one line of JSON: {error}") from error
    if wrong := row_error(row):
        raise ValueError(f"{path}: {wrong}; given {row!r:.200}")
    return row


def _images(samples: Path) -> list[Path]:
    every = sorted(p for p in samples.glob("*") if is_image(p) and p.stem != "grid")
    paths = [p for p in every if re.fullmatch(r"\d+", p.stem)]
    if not paths:
        raise ValueError(f"{samples} holds no images called 0000.png, 0001.png ...")
    if others := [p.name for p in every if p not in paths]:
        message = f"{samples}: left out {len(others)} images not called by a number: {others[0]!r}"
        warnings.warn(message, stacklevel=2)
    for path in paths:
        try:
            images.dimensions(path)
        except images.UnreadableError as error:
            raise ValueError(f"{path} is broken: {error}") from error
    return paths
