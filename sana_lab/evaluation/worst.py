"""The worst cases of an autoencoder as one picture: original, reconstruction, and their difference, amplified."""

import heapq
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

AMPLIFY = 4
"""What the absolute difference of 8-bit values is multiplied by."""

SIDE, GAP, LINE = 512, 8, 20
"""Pixels: the longer side of a picture at most, the space between pictures, and the height of a line of text."""


class Case(NamedTuple):
    """One image and what came back of it."""

    psnr: float  # dB
    name: str
    image: Tensor  # (3, H, W) uint8
    other: Tensor


def worst_of(cases: Iterable[Case], count: int) -> list[Case]:
    """The `count` of the lowest PSNR, the worst first."""
    return heapq.nsmallest(count, cases, key=lambda case: (case.psnr, case.name))


def draw(cases: Sequence[Case], path: Path) -> None:
    """Write a PNG with one row a case, its file name below; pictures over 512 pixels are scaled down."""
    rows = [row(case) for case in cases]
    width, height = max(r.width for r in rows), sum(r.height for r in rows)
    canvas, top = Image.new("RGB", (width, height), "white"), 0
    for each in rows:
        canvas.paste(each, (0, top))
        top += each.height
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)


def row(case: Case) -> Image.Image:
    """Original, reconstruction and amplified difference side by side, with a line of text below."""
    views = [_view(v) for v in (case.image, case.other, difference(case.image, case.other))]
    text, font = caption(case), ImageFont.load_default(12)
    width = max(sum(v.width + GAP for v in views), GAP + int(font.getlength(text)))
    canvas, left = Image.new("RGB", (width, views[0].height + LINE + GAP), "white"), 0
    for view in views:
        canvas.paste(view, (left, 0))
        left += view.width + GAP
    ImageDraw.Draw(canvas).text((0, views[0].height + 2), text, "black", font)
    return canvas


def caption(case: Case) -> str:
    """The file's name, its PSNR, and what the three pictures are; letters that the font lacks become question marks."""
    name = case.name.encode("latin-1", "replace").decode("latin-1")
    return f"{name}   {case.psnr:.2f} dB   original | reconstruction | difference x {AMPLIFY}"


def difference(image: Tensor, other: Tensor) -> Tensor:
    """|a - b| times `AMPLIFY`, at most 255: (3, H, W) uint8."""
    return ((image.int() - other.int()).abs() * AMPLIFY).clamp(max=255).byte()


def _view(image: Tensor) -> Image.Image:
    view = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    view.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return view
