"""Pictures of samples: grids with prompts above columns and labels beside rows, and rows with captions."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

from sana_lab.config.atomic_write import replacing

if TYPE_CHECKING:
    from torch import Tensor

TEXT, MARGIN, CELL = 13, 8, 112  # pixels: font, space around cells, cell width by default


def grid(images: "Mapping[str, Tensor]", prompts: Sequence[str], path: Path | str, scale: int | None = None) -> Path:
    """Samples side by side: a row for each label, a column for each prompt, the same noise down a column.

    `images` are uint8 (N, 3, H, W) for N prompts. Pixels are enlarged `scale` times with nearest neighbours, by default
    to cells 112 pixels wide. Smaller rows are resized to the largest. ValueError if a row's number of images differs
    from the number of prompts.
    """
    with replacing(Path(path)) as partial:
        montage(images, prompts, scale).save(partial, "PNG")
    return Path(path)


def montage(images: "Mapping[str, Tensor]", prompts: Sequence[str], scale: int | None = None) -> Image.Image:
    """The picture of `grid`; a row whose label is empty has none."""
    if not images or not prompts:
        raise ValueError(f"no samples to show for {len(prompts)} prompts and the rows {list(images)}")
    for label, batch in images.items():
        _check_images(label, batch, len(prompts))
    widest, tallest = (max(batch.shape[axis] for batch in images.values()) for axis in (3, 2))
    factor = scale or max(1, math.ceil(CELL / widest))
    return _draw_grid(images, prompts, (widest * factor, tallest * factor))


def captioned(images: "Tensor", prompts: Sequence[str]) -> Image.Image:
    """One row of uint8 (B, 3, H, W) with a prompt above each image."""
    return montage({"": images}, prompts)


def _check_images(label: str, batch: "Tensor", n: int) -> None:
    if str(batch.dtype) != "torch.uint8" or batch.ndim != 4 or tuple(batch.shape[:2]) != (n, 3):
        dtype = str(batch.dtype).removeprefix("torch.")
        raise ValueError(
            f"row {label!r} is {dtype} {tuple(batch.shape)}, expected uint8 ({n}, 3, H, W) for {n} prompts"
        )


def _draw_grid(images: "Mapping[str, Tensor]", prompts: Sequence[str], cell: tuple[int, int]) -> Image.Image:
    """The montage with prompts above its columns and labels beside its rows; `cell` is (width, height)."""
    font = ImageFont.truetype(findfont("DejaVu Sans"), TEXT)
    heads = [_wrap(prompt, cell[0], font) for prompt in prompts]
    labels = [_wrap(label, 150, font) for label in images]
    line, (step_x, step_y) = TEXT + 4, (cell[0] + MARGIN, cell[1] + MARGIN)
    left = MARGIN + max(int(font.getlength(text)) for lines in labels for text in lines) + MARGIN
    top = MARGIN + line * max(map(len, heads)) + MARGIN
    canvas = Image.new("RGB", (left + step_x * len(prompts), top + step_y * len(images)), "white")
    canvas.paste(_montage(list(images.values()), len(prompts), cell), (left - MARGIN, top - MARGIN))
    draw = ImageDraw.Draw(canvas)
    for x, lines in enumerate(heads):
        _write(draw, lines, (left + x * step_x, top - MARGIN // 2 - line * len(lines)), font)
    for y, lines in enumerate(labels):
        _write(draw, lines, (MARGIN, top + y * step_y + (cell[1] - line * len(lines)) // 2), font)
    return canvas


def _montage(rows: "Sequence[Tensor]", columns: int, cell: tuple[int, int]) -> Image.Image:
    """All images as cells of the same size with margins."""
    import torch
    from torchvision.transforms.functional import to_pil_image
    from torchvision.utils import make_grid

    cells = [torch.nn.functional.interpolate(row.cpu(), cell[::-1], mode="nearest-exact") for row in rows]
    return to_pil_image(make_grid(torch.cat(cells), nrow=columns, padding=MARGIN, pad_value=255))


def _write(draw: ImageDraw.ImageDraw, lines: Sequence[str], at: tuple[int, int], font: ImageFont.FreeTypeFont) -> None:
    for i, line in enumerate(lines):
        draw.text((at[0], at[1] + i * (TEXT + 4)), line, fill="black", font=font)


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """Lines that fit `width` pixels; a word that does not fit is truncated on its own line."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines += [_cut(word, width, font)]
    return [line for line in lines if line] or [""]


def _cut(word: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    while font.getlength(word) > width and len(word) > 2:
        word = word[:-2] + "…"
    return word
