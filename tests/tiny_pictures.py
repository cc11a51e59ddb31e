"""Sets of tiny pictures in several layouts, for tests of data at scale."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file

from sana_lab.config import specs

SHAPES = ((40, 40), (64, 32), (32, 64), (48, 36))
VAE = {**tiny.VAE, "middle_attention": False}


def picture(number: int) -> bytes:
    """A picture as PNG, of the shape SHAPES[number % 4]; its first pixel is its number."""
    pixels = np.random.default_rng(number).integers(0, 256, (*SHAPES[number % len(SHAPES)], 3), np.uint8)
    pixels[0, 0] = number
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def said(number: int) -> dict[str, Any]:
    """Two captions of a picture, with scores."""
    return {"captions": [f"a picture {number}", "noise" + " and noise" * (number % 5)], "clip_scores": [20, 30]}


def tar(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> None:
    """A tar in webdataset's layout: of each sample a file for each ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for key, members in samples:
            for ending, content in members.items():
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))


def tars(root: Path, numbers: Iterable[int], per_tar: int = 12) -> Path:
    """Tars of pictures with their .json."""
    numbers = list(numbers)
    for first in range(0, len(numbers), per_tar):
        group = numbers[first : first + per_tar]
        members = [(f"{n:05}", {"png": picture(n), "json": json.dumps(said(n)).encode()}) for n in group]
        tar(root / f"{first // per_tar:05}.tar", members)
    return root


def folder(root: Path, numbers: Iterable[int], **columns: Any) -> Path:
    """A folder of pictures with captions.jsonl; `columns` are functions of a number."""
    root.mkdir(parents=True, exist_ok=True)
    rows = []
    for n in numbers:
        (root / f"{n:05}.png").write_bytes(picture(n))
        rows.append({"file_name": f"{n:05}.png", **said(n), **{name: of(n) for name, of in columns.items()}})
    (root / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return root


def weights(folder: Path) -> dict[str, dict[str, Any]]:
    """Specs of a tiny autoencoder and text encoder with weights in files."""
    torch.manual_seed(0)
    made = {}
    for kind, spec in (("autoencoder", VAE), ("text_encoder", tiny.T5)):
        path = folder / f"{kind}.safetensors"
        save_file(specs.build(kind, spec).state_dict(), path)
        made[kind] = {**spec, "weights": str(path)}
    return made


class Stop(Exception):
    """Raised in mid-epoch."""


def stop_at_ten(step: int, *_: object) -> None:
    """A progress that ends a training, in whatever process."""
    if step == 10:
        raise Stop
