"""Debris: pixels of an image that its objects and the background do not explain.

The objects are drawn as ideal shapes with their measured place, size and colour, and the drawing is compared with the
image. Constants are calibrated for images with a shorter side of 64 px. Legend: N objects; lengths in pixels, colours
in RGB up to 255.
"""

from typing import NamedTuple

import numpy as np
import scipy
from numpy.typing import NDArray

from sana_lab.shapes.scenes import BACKGROUND, SHAPES, distance, unit_area

Float = NDArray[np.float64]
Int = NDArray[np.int64]

DIFFERENCE = 30.0  # RGB distance above which a pixel differs from the drawing
EDGE = 2.0  # distance from an object's outline within which twice that difference is allowed
GROUND = 4.0  # distance from all outlines beyond which a pixel is the background's
TINT = 15.0  # RGB distance of the background's median colour above which all of a tinted background differs
LIMIT = 12  # pixels of debris in an image without debris; the smallest object has 73


class Forms(NamedTuple):
    """Objects to draw."""

    shape: Int  # (N,) into SHAPES
    center: Float  # (N, 2) x, y
    area: Float  # (N,)


def constants() -> dict[str, float]:
    """What the number of pixels and its limit depend on."""
    return {"limit": LIMIT, "difference": DIFFERENCE, "edge": EDGE, "ground": GROUND, "tint": TINT}


def debris(smooth: Float, things: Forms, blur: float) -> int:
    """Number of pixels of an (H, W, 3) image, blurred by `blur`, that differ from its objects on the background."""
    signed = _distances(things, smooth.shape[:2])
    rest = smooth - BACKGROUND
    for d in signed:
        cover = scipy.ndimage.gaussian_filter(np.clip(0.5 - d, 0, 1), blur)
        rest -= cover[..., None] * _color(cover, rest)
    allowed = DIFFERENCE * (1 + (np.abs(signed) < EDGE).any(0))
    ground = (signed > GROUND).all(0)
    if ground.any() and np.linalg.norm(np.median(rest[ground], axis=0)) > TINT:
        allowed = np.where(ground, TINT, allowed)
    return int((np.linalg.norm(rest, axis=-1) > allowed).sum())


def _color(cover: Float, rest: Float) -> Float:
    """(3,) colour, less the background's, of an object with coverage (H, W) that is nearest to the image."""
    color: Float = np.einsum("hw,hwc->c", cover, rest) / max((cover**2).sum(), 1e-3)
    return color


def _distances(things: Forms, size: tuple[int, ...]) -> Float:
    """(N, H, W) signed distance of each pixel's centre from each object's outline."""
    ys, xs = np.indices(size) + 0.5
    radius = (things.area / [unit_area(SHAPES[s]) for s in things.shape]) ** 0.5
    rows = zip(things.shape.tolist(), things.center.tolist(), radius.tolist(), strict=True)
    return np.array([distance(s, xs - x, ys - y, r) for s, (x, y), r in rows]).reshape(-1, *size)
