"""Image files of any size and mode to 8-bit RGB of one size.

Turned upright by EXIF; transparency composited on white; 16-bit grey divided by 257; the first frame of an animation;
CMYK, palette and the rest by Pillow's own conversion, colour profiles ignored. Scaled by Pillow's bicubic filter, which
is antialiased: its support grows with the reduction.
"""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from sana_lab.data import image_metadata
from sana_lab.data.image_formats import formats

MAX_PIXELS = 89_478_485
"""Most pixels of an image that is decoded, 9,459 a side: 341 MiB in RGB. Beyond, a JPEG is read at half its size."""

Resize = Literal["cover", "contain", "stretch", "crop"]

T = TypeVar("T")

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableError(Exception):
    """A file that is no readable image; the message says why."""


class Blob:
    """An image file in memory, with what is read of a path."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.st_size = len(content)

    def open(self, mode: str = "rb") -> BytesIO:
        """The content as a file."""
        return BytesIO(self.content)

    def stat(self) -> "Blob":
        """Its size as `st_size`."""
        return self

    def is_file(self) -> bool:
        """True."""
        return True


Source = Path | Blob
"""A file that holds an image."""


def read(path: Source) -> Image.Image:
    """The image, upright, in 8-bit RGB. UnreadableError."""
    return _robust(path, _decoded)


def dimensions(path: Source) -> tuple[int, int]:
    """Width and height from the header, before EXIF rotation. UnreadableError."""
    return _robust(path, _size)


def upright_dimensions(path: Source) -> tuple[int, int]:
    """Height and width from the header, after EXIF rotation. UnreadableError."""
    return _robust(path, _upright_size)


@contextmanager
def quiet() -> Iterator[None]:
    """Without Pillow's warnings of odd metadata and of size. Also needed around threads: it sets the filters of all."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def _robust(path: Source, function: Callable[[BinaryIO, bytes], T]) -> T:
    """A function of (image file, EXIF block), again without the metadata where that fails. UnreadableError."""
    try:
        with quiet():
            return _retry(path, function)
    except UnreadableError:
        raise
    except Exception as error:  # decoders raise many types for broken files: OSError, SyntaxError, struct.error ...
        raise UnreadableError(_reason(error, path)) from error


def _retry(path: Source, function: Callable[[BinaryIO, bytes], T]) -> T:
    try:
        with path.open("rb") as file:  # by name, Pillow maps uncompressed TIFFs into memory and turns them wrongly
            return function(file, b"")
    except UnreadableError:
        raise
    except Exception as error:
        without = image_metadata.stripped(path)
        if without is None or isinstance(error, Image.DecompressionBombError):
            raise
        try:
            return function(*without)
        except UnreadableError:
            raise
        except Exception:
            raise error from None


def _size(source: BinaryIO, exif: bytes) -> tuple[int, int]:
    with Image.open(source, formats=formats()) as image:
        _bound(image)
        return image.size


def _upright_size(source: BinaryIO, exif: bytes) -> tuple[int, int]:
    with Image.open(source, formats=formats()) as image:
        _bound(image)
        turned = _rotation(image, exif) in (5, 6, 7, 8)
        return (image.width, image.height) if turned else (image.height, image.width)


def _decoded(source: BinaryIO, exif: bytes) -> Image.Image:
    if not exif and (bare := image_metadata.bare_tiff(source)) is not None:  # which Pillow would turn, but not always
        source, exif = bare
    with Image.open(source, formats=formats()) as image:
        if _bound(image):
            image.draft(None, (image.width // 2, image.height // 2))
        image.load()
        return rgb(_upright(image, exif))


def _bound(image: Image.Image) -> bool:
    """Whether an image must be read at half its size. UnreadableError for one that is too large and cannot."""
    pixels = image.width * image.height
    if pixels > MAX_PIXELS and image.format not in ("JPEG", "MPO"):
        raise UnreadableError(_too_large(f"{image.width}x{image.height}, {pixels:,}", image.format or "it"))
    return pixels > MAX_PIXELS


def _too_large(size: str, name: str) -> str:
    return f"{size} pixels: at most {MAX_PIXELS:,} are decoded, and {name} cannot be read reduced; save a smaller copy"


def _upright(image: Image.Image, exif: bytes) -> Image.Image:
    """Rotate by the EXIF orientation; other metadata are ignored."""
    number = _rotation(image, exif)
    return image.transpose(_UPRIGHT[number]) if number in _UPRIGHT else image


def _rotation(image: Image.Image, exif: bytes) -> int | None:
    return image_metadata.orientation(exif or image.info.get("exif", b"")) or _orientation(image)


def _orientation(image: Image.Image) -> int | None:
    """The orientation where it is in XMP or in the tags of a TIFF."""
    try:
        value = image.getexif().get(image_metadata.ORIENTATION)
    except Exception:  # odd metadata provoke any
        return None
    return value if isinstance(value, int) else None


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
    contain: the whole image, centred on white; stretch: the whole image, with changed proportions; crop: at its own
    resolution, a square of `size` pixels of it, at `at` too; a smaller image as by cover.
    """
    if resize == "contain":
        return _contain(image, size)
    side = min(size, *image.size) if resize == "crop" else min(image.size)
    box = None if resize == "stretch" else _square(image.size, side, at)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def cover(image: Image.Image, height: int, width: int, at: tuple[float, float] = (0.5, 0.5)) -> Image.Image:
    """The largest crop of the proportions of `height` x `width`, at the fraction `at` of the margins, at that size."""
    scale = min(image.width / width, image.height / height)
    size = (width * scale, height * scale)
    left, top = ((length - side) * where for length, side, where in zip(image.size, size, at, strict=True))
    box = (left, top, min(left + size[0], image.width), min(top + size[1], image.height))
    return image.resize((width, height), Image.Resampling.BICUBIC, box=box)


def _square(size: tuple[int, int], side: int, at: tuple[float, float]) -> tuple[float, float, float, float]:
    """A square of that side; of a part of the image, on whole pixels."""
    left, top = ((length - side) * where for length, where in zip(size, at, strict=True))
    if side < min(size):
        left, top = round(left), round(top)
    return left, top, left + side, top + side


def _contain(image: Image.Image, size: int) -> Image.Image:
    width, height = (max(1, round(side * size / max(image.size))) for side in image.size)
    canvas = Image.new("RGB", (size, size), "white")
    small = image.resize((width, height), Image.Resampling.BICUBIC)
    canvas.paste(small, ((size - width) // 2, (size - height) // 2))
    return canvas


def _deep_grey(image: Image.Image) -> Image.Image:
    """Integers are read as [0, 65535]; floats as [0, 1], or as [0, 255] if any value is above 1."""
    values = np.nan_to_num(np.asarray(image, np.float64))
    white = 65535 if image.mode.startswith("I") else 255 if values.max() > 1 else 1
    grey = (values.clip(0, white) * (255 / white)).round().astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _reason(error: Exception, path: Source) -> str:
    if isinstance(error, Image.DecompressionBombError):
        pixels = re.search(r"\d+", str(error))
        return _too_large(f"{int(pixels[0]):,}" if pixels else "too many", "it")
    if isinstance(error, UnidentifiedImageError):
        return (
            "not an image: the file is empty"
            if path.is_file() and not path.stat().st_size
            else "not an image that Pillow knows"
        )
    return f"{type(error).__name__}: {error}"
