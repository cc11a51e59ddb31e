"""Image files of any size and mode to 8-bit RGB of one size.

Turned upright by EXIF; transparency composited on white; 16-bit grey divided by 257; the first frame of an animation;
CMYK, palette and the rest by Pillow's own conversion, colour profiles ignored. Scaled by Pillow's bicubic filter, which
is antialiased: its support grows with the reduction.
"""

from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")

Resize = Literal["cover", "contain", "stretch"]


class UnreadableError(Exception):
    """A file that is no readable image; the message says why."""


def read(path: Path) -> Image.Image:
    """The image, upright, in 8-bit RGB. UnreadableError."""
    try:
        with Image.open(path) as image:
            return rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # decoders raise whatever a broken file provokes: OSError, SyntaxError, struct.error ...
        raise UnreadableError(_reason(error)) from error


def dimensions(path: Path) -> tuple[int, int]:
    """Width and height from the header alone, before EXIF rotation. UnreadableError."""
    try:
        with Image.open(path) as image:
            return image.size
    except Exception as error:
        raise UnreadableError(_reason(error)) from error


def rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any mode."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _deep_grey(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def fit(image: Image.Image, size: int, resize: Resize, at: tuple[float, float] = (0.5, 0.5)) -> Image.Image:
    """A square of `size` pixels.

    cover: the largest square crop, at the fraction `at` of the margins (0 is left or top, 1 right or bottom);
    contain: the whole image, centred on white; stretch: the whole image, with changed proportions.
    """
    if resize == "contain":
        return _contain(image, size)
    box = _square(image.size, at) if resize == "cover" else None
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def _square(size: tuple[int, int], at: tuple[float, float]) -> tuple[float, float, float, float]:
    side = min(size)
    left, top = ((length - side) * where for length, where in zip(size, at, strict=True))
    return left, top, left + side, top + side


def _contain(image: Image.Image, size: int) -> Image.Image:
    width, height = (max(1, round(side * size / max(image.size))) for side in image.size)
    canvas = Image.new("RGB", (size, size), "white")
    small = image.resize((width, height), Image.Resampling.BICUBIC)
    canvas.paste(small, ((size - width) // 2, (size - height) // 2))
    return canvas


def _deep_grey(image: Image.Image) -> Image.Image:
    """Integers are taken as [0, 65535]; floats as [0, 1], or as [0, 255] where one is above 1."""
    values = np.asarray(image, np.float64)
    white = 65535 if image.mode.startswith("I") else 255 if values.max() > 1 else 1
    grey = (values.clip(0, white) * (255 / white)).round().astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow knows"
    return f"{type(error).__name__}: {error}"
