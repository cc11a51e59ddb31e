"""The exact judge of the embedded world: what is in a picture, from colour and form, without a network.

Each pixel takes the nearest colour in Lab; flat patches of one colour are cores; a core gathers the pixels around it by
how much of its colour they hold; the moments of that cover tell the shape. Pictures are judged with the shorter side at
64 px, where the numbers below were calibrated. Legend: N objects, F features; label images hold 0 for the ground.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from skimage.color import rgb2lab
from skimage.measure import label
from torch import Tensor
from torch.nn.functional import interpolate

from sana_lab.evaluation.geneval.detectors import Detector
from sana_lab.shapes.scenes import BACKGROUND, COLORS, PALETTE, SHAPES, draw, least_share, scenes
from sana_lab.types import Json, Object

Float = NDArray[np.float64]
Int = NDArray[np.int64]

SIDE = 64  # pixels of the shorter side, as judged
SMOOTH = 0.8  # standard deviation in pixels of the blur against noise
REACH = 6  # pixels around a core in which its object may lie
RIM = 30.0  # RGB distance within which a core is a mixture of its larger neighbour and the ground
LEAST = 0.75 * np.array([least_share(shape) for shape in SHAPES]) * SIDE**2  # pixels, by shape; less is debris
MOST = 40.0  # pixels, longer side of the box; the largest object of the world has 30

FEATURES = ("compactness", "extent", "lean", "fourfold")
CENTROIDS = np.array(  # of SHAPES, and the spread within them: what `calibrate` measures
    [[0.992, 0.787, 0.0, 0.003], [0.956, 0.97, 0.0, -0.497], [0.851, 0.615, -0.491, 0.005], [0.879, 0.588, 0.0, 0.709]]
)
SPREAD = np.array([0.0125, 0.037, 0.0305, 0.0465])
LIMIT = 10.0  # spreads from the nearest centroid; beyond it a form has no name (99 % are within 8.3 after JPEG 50)


class Regions(NamedTuple):
    """Objects as measured at SIDE, before they are named."""

    color: Int  # (N,) into COLORS
    area: Float  # (N,) pixels
    box: Float  # (N, 4) x0, y0, x1, y1 in pixels
    features: Float  # (N, F)


class ShapesJudge(Detector):
    """Finds the world's objects in a picture: label, box, colour, and as score the share of the picture covered."""

    labels = SHAPES
    title = "shapes"
    names_colors = True

    def detect(self, image: Tensor | NDArray[np.uint8]) -> list[Object]:
        """The objects in a uint8 (3, H, W) image, largest first. Forms that are none of SHAPES are left out."""
        rgb, scale = _native(image)
        found = measure(rgb)
        names, far = classify(found.features)
        seen = (found.area >= LEAST[names]) & (_longer(found.box) <= MOST) & (far <= LIMIT)
        whole = rgb.shape[0] * rgb.shape[1]
        order = sorted(np.nonzero(seen)[0].tolist(), key=lambda i: -found.area[i])
        return [
            Object(SHAPES[names[i]], _tuple(found.box[i] * scale), float(found.area[i] / whole), COLORS[found.color[i]])
            for i in order
        ]

    def identity(self) -> Json:
        return {"detector": "shapes", "side": SIDE, "limit": LIMIT}


def classify(features: Float) -> tuple[Int, Float]:
    """(N,) the nearest of SHAPES and how many spreads away it is."""
    away = np.linalg.norm((features[:, None] - CENTROIDS) / SPREAD, axis=-1)
    return away.argmin(1), away.min(1)


def _native(image: Tensor | NDArray[np.uint8]) -> tuple[Float, float]:
    """(h, w, 3) in [0, 255] with its shorter side at SIDE, and how many given pixels one of its pixels spans."""
    given = torch.as_tensor(image)
    if given.ndim != 3 or given.shape[0] != 3 or given.dtype != torch.uint8:
        raise ValueError(f"the judge takes one uint8 image (3, H, W); given {given.dtype} {tuple(given.shape)}")
    height, width = given.shape[1:]
    scale = min(height, width) / SIDE
    if scale != 1:
        size = [round(height / scale), round(width / scale)]
        given = interpolate(given[None].float(), size, mode="bilinear", antialias=True)[0]
    return given.cpu().numpy().transpose(1, 2, 0).astype(np.float64), scale


def _longer(box: Float) -> Float:
    return (box[:, 2:] - box[:, :2]).max(-1, initial=0)


def _tuple(box: Float) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = box.tolist()
    return x0, y0, x1, y1


# --- measuring ------------------------------------------------------------------------------------------------------


def measure(rgb: Float) -> Regions:
    """Everything in an (H, W, 3) image in [0, 255] that has a flat patch of a colour of its own."""
    smooth = ndimage.gaussian_filter(rgb, (SMOOTH, SMOOTH, 0))
    colors = nearest_colors(smooth)
    flat = ndimage.minimum_filter(colors, 3) == ndimage.maximum_filter(colors, 3)
    cores = _without_rims(label(np.where(flat, colors, -1), background=-1, connectivity=1), smooth)
    owner, cover = _cover(cores, smooth)
    first = [int(np.argmax(cores == i)) for i in range(1, cores.max() + 1)]
    box = _boxes(np.where(cover > 0.5, owner, 0), len(first))
    area, features = _moments(owner, cover, box)
    return Regions(colors.ravel()[first].astype(np.int64), area, box, features)


def nearest_colors(rgb: Float) -> NDArray[np.int8]:
    """(H, W) into COLORS, -1 for the background, from (H, W, 3) in [0, 255]; exact to 5 bits per channel."""
    r, g, b = np.moveaxis(rgb, -1, 0).clip(0, 255).astype(np.int64) >> 3
    return _lookup()[r, g, b]


@cache
def _lookup() -> NDArray[np.int8]:
    """(32, 32, 32) the nearest of COLORS in Lab to the middle of each 5-bit RGB cell, -1 for the background."""
    grid = (np.stack(np.meshgrid(*[np.arange(32)] * 3, indexing="ij"), -1) * 8 + 4) / 255
    targets = rgb2lab(np.array([*PALETTE.values(), BACKGROUND])[None] / 255)[0]
    nearest = ((rgb2lab(grid)[..., None, :] - targets) ** 2).sum(-1).argmin(-1)
    return np.where(nearest == len(COLORS), -1, nearest).astype(np.int8)


def _without_rims(cores: Int, smooth: Float) -> Int:
    """Cores 1 ... N without those that are a larger neighbour's edge: its colour thinned by the ground."""
    area, mean = np.bincount(cores.ravel()), _means(cores, smooth)
    gone = np.zeros(len(area), bool)
    for j in 1 + np.argsort(-area[1:], kind="stable"):
        if not gone[j]:
            near = np.unique(cores[ndimage.binary_dilation(cores == j, iterations=3)])
            smaller = near[(near > 0) & (area[near] <= area[j]) & (near != j)]
            gone[smaller] |= _residual(mean[smaller], mean[j]) < RIM
    return np.where(gone, 0, np.cumsum(~gone) - 1)[cores]


def _means(regions: Int, values: Float) -> Float:
    """(N + 1, 3) mean of (H, W, 3) values over each region, less the ground's colour."""
    flat = regions.ravel()
    sums = [np.bincount(flat, values[..., channel].ravel()) for channel in range(3)]
    return np.stack(sums, -1) / np.maximum(np.bincount(flat), 1)[:, None] - BACKGROUND


def _residual(colors: Float, pure: Float) -> Float:
    """RGB distance from each colour to the segment between the ground (zero) and a pure colour."""
    share = np.clip(colors @ pure / (pure @ pure), 0, 1)
    return np.linalg.norm(colors - share[:, None] * pure, axis=1)


def _cover(cores: Int, smooth: Float) -> tuple[Int, Float]:
    """(H, W) whose core is nearest, 0 beyond REACH, and how much of the pixel its object covers, in [0, 1]."""
    away, (rows, columns) = ndimage.distance_transform_edt(cores == 0, return_indices=True)
    owner = np.where(away <= REACH, cores[rows, columns], 0)
    pure = _means(cores, smooth)[owner]
    share = ((smooth - BACKGROUND) * pure).sum(-1) / np.maximum((pure**2).sum(-1), 1)
    cover = np.clip(2 * share - 0.5, 0, 1) * (owner > 0)  # steeper than the edge: undoes part of SMOOTH
    parts = label(np.where(cover > 0.5, owner, 0), background=0, connectivity=1)
    attached = np.isin(parts, np.unique(parts[cores > 0])) & (parts > 0)
    return owner, cover * ndimage.binary_dilation(attached)


def _boxes(masks: Int, n: int) -> Float:
    """(N, 4) x0, y0, x1, y1 around each label; nothing has an empty box."""
    found = ndimage.find_objects(masks, n)
    boxes = [(0, 0, 0, 0) if at is None else (at[1].start, at[0].start, at[1].stop, at[0].stop) for at in found]
    return np.array(boxes, np.float64).reshape(-1, 4)


def _moments(owner: Int, cover: Float, box: Float) -> tuple[Float, Float]:
    """Area (N,) and FEATURES (N, F), none of which changes with position or size.

    Compactness A / (2 pi s) with s the mean square radius (1 for a disc, 3/pi for a square, 0.827 for an equilateral
    triangle); extent, the area's share of its box; lean, the skewness along y; fourfold, the mean of
    r^4 cos(4 theta) / s^2.
    """
    flat, weight, n = owner.ravel(), cover.ravel(), len(box) + 1
    ys, xs = np.indices(owner.shape, np.float64).reshape(2, -1)
    area = np.maximum(np.bincount(flat, weight, n), 1.0)

    def mean(values: Float) -> Float:
        return np.bincount(flat, weight * values, n) / area

    x, y = xs - mean(xs)[flat], ys - mean(ys)[flat]
    s, t = np.maximum(mean(x**2 + y**2), 1e-3), np.maximum(mean(y**2), 1e-3)
    extent = area / np.maximum(np.concatenate([[0], (box[:, 2:] - box[:, :2]).prod(-1)]), 1)
    fourfold = mean(x**4 - 6 * x**2 * y**2 + y**4) / s**2
    features = np.stack([area / (2 * np.pi * s), extent, mean(y**3) / t**1.5, fourfold], -1)
    return area[1:], features[1:]


def calibrate(n: int = 400, seed: int = 5) -> tuple[Float, Float]:
    """CENTROIDS (shapes, F) and SPREAD (F,) over n scenes, each seen clean, blurred (1.5 px) and noisy (20 of 255)."""
    rows = scenes(seed, range(n))
    clean = draw(rows, SIDE).transpose(0, 2, 3, 1).astype(np.float64)
    blurred = ndimage.gaussian_filter(clean, (0, 1.5, 1.5, 0))
    noisy = (clean + np.random.default_rng(seed).normal(0, 20, clean.shape)).clip(0, 255)
    groups: list[list[Float]] = [[] for _ in SHAPES]
    for images in (clean, blurred, noisy):
        for i, image in enumerate(images):
            found = measure(image)
            middle = (found.box[:, :2] + found.box[:, 2:]) / 2 / SIDE
            for m in range(rows.count[i]):
                nearest = np.linalg.norm(middle - rows.center[i, m], axis=-1).argmin()
                groups[rows.shape[i, m]].append(found.features[nearest])
    means = np.array([np.mean(group, 0) for group in groups])
    return means, np.sqrt(np.mean([np.var(group, 0) for group in groups], 0))
