"""Aspect-ratio buckets: the image shapes that SANA trains on, and the one that fits a picture."""

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Buckets = Literal["none", "sana"]

AT_ONCE = 2**17
"""Pictures whose bucket is found at a time, so that millions need little memory."""

_WIDE = "8 32, 8 31, 8 30, 8 29, 9 28, 9 27, 9 26, 10 25, 10 24, 11 23, 11 22, 11 21, 12 21, 12 20, 13 19, 13 18, "
_WIDE += "14 18, 14 17, 15 17, 15 16, 16 16"
_WIDE_2880 = "44 180, 44 174, 44 168, 44 162, 50 156, 50 150, 50 146, 56 140, 56 134, 60 128, 60 122, 60 118, 66 120, "
_WIDE_2880 += "66 112, 72 106, 72 100, 78 100, 78 94, 84 94, 84 90, 90 90"
_NOT_MIRRORED = ((11, 21), (60, 118))
"""Shapes of the published tables that have no counterpart on the other side of the square."""


class Shape(NamedTuple):
    """Height and width in pixels."""

    height: int
    width: int


def shapes(size: int, multiple: int = 1) -> list[Shape]:
    """Shapes of about `size`² pixels, from 1:4 to 4:1 by height over width, sides multiples of `multiple`.

    At 512, 1024, 2048 and 4096 these are the 40 of ASPECT_RATIO_512 to ASPECT_RATIO_4096 of NVlabs/Sana, at 2880 those
    of ASPECT_RATIO_2880; other sizes are scaled from the former, and shapes that rounding makes equal are one.
    ValueError if the square's side is not a multiple.
    """
    if size % multiple:
        raise ValueError(f"buckets: size {size} is not a multiple of {multiple}")
    half, unit = (_WIDE_2880, 32.0) if size == 2880 else (_WIDE, size / 16)
    sides = [tuple(int(side) for side in pair.split()) for pair in half.split(", ")]
    sides += [(width, height) for height, width in reversed(sides[:-1]) if (height, width) not in _NOT_MIRRORED]
    rounded = (Shape(*(_round(side * unit, multiple) for side in pair)) for pair in sides)
    return list(dict.fromkeys(rounded))


def nearest(shapes: list[Shape], heights: NDArray[np.integer], widths: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Index of the shape whose height over width is nearest to each picture's, by absolute difference as in SANA."""
    ratios = np.array([height / width for height, width in shapes])
    order = np.argsort(ratios, kind="stable")
    middles = (ratios[order][1:] + ratios[order][:-1]) / 2
    out, codes = np.empty(len(heights), np.uint8), order.astype(np.uint8)
    for first in range(0, len(out), AT_ONCE):
        part = slice(first, first + AT_ONCE)
        out[part] = codes[np.searchsorted(middles, heights[part] / widths[part])]
    return out


def _round(side: float, multiple: int) -> int:
    return max(1, round(side / multiple)) * multiple
