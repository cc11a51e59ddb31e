"""Which files are images: Pillow's formats, their endings, and their first bytes."""

import functools
import re
from io import BytesIO
from pathlib import Path

from PIL import Image

NO_PICTURES = ("EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "IPTC")
"""Pillow's formats that are not read: drawings that run another program, videos, and tables of numbers."""

UNREADABLE_ENDINGS = (
    *(".heic", ".heif", ".hif", ".jxl", ".jxr", ".svg", ".svgz", ".eps", ".ps", ".ai", ".wmf", ".emf"),
    *(".exr", ".hdr", ".psb", ".xcf", ".bpg", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf"),
    *(".rw2", ".raf", ".pef", ".srw"),
)
"""Endings of pictures that Pillow cannot read without a plug-in."""

_MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n|GIF8[79]a|RIFF....WEBP|BM....\0\0\0\0|II\*\0|MM\0\*|\0\0\0\x0cjP  "
    rb"|\xff\x4f\xff\x51|qoif|8BPS\0|\0\0\0.ftyp(?:avif|avis|heic|heix|hevc|mif1|msf1)",
    re.DOTALL,
)


@functools.cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read."""
    Image.init()
    return tuple(name for name in Image.ID if name not in NO_PICTURES)


@functools.cache
def endings() -> frozenset[str]:
    """Endings of image files, in lower case."""
    by_format = {ending for ending, name in Image.EXTENSION.items() if name in formats()} if formats() else set()
    return frozenset(by_format | {".jif", ".jfi", ".pjpeg", ".pjp"})


def is_image(path: Path) -> bool:
    """Whether a file is an image by its ending, and not hidden."""
    return path.suffix.lower() in endings() and not path.name.startswith(".") and path.is_file()


def has_magic(path: Path) -> bool:
    """Whether a file begins as a common image format does."""
    try:
        with path.open("rb") if path.is_file() else BytesIO() as file:
            return _MAGIC.match(file.read(32)) is not None
    except OSError:
        return False
