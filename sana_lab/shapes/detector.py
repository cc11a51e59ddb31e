"""Exact detector of the embedded world's objects, from colour and form, without a network.

Each pixel is assigned the nearest colour in Lab; flat patches of one colour are cores; a core's coverage is the
fraction of its colour in the surrounding pixels; the moments of that coverage classify the shape. Images are resized to
64 px on the shorter side, for which the constants are calibrated. Legend: N objects, F features; label images are 0 in
the background.
"""

import hashlib
from functools import cache
from typing import NamedTuple

import numpy as np
import scipy
import torch
from numpy.typing import NDArray
from skimage.color import rgb2lab
from skimage.measure import label
from torch import Tensor
from torch.nn.functional import interpolate

from sana_lab.evaluation.geneval import prompts
from sana_lab.evaluation.geneval.detectors import Detector
from sana_lab.shapes.debris import Forms, debris
from sana_lab.shapes.scenes import BACKGROUND, COLORS, PALETTE, SHAPES, smallest_area
from sana_lab.types import Json, Object

Float = NDArray[np.float64]
Int = NDArray[np.int64]

SIDE = 64  # pixels of the shorter side, as analysed
BLUR = 0.8  # standard deviation in pixels of the blur against noise
REACH = 6  # maximum pixels from a core to its object's edge
RIM = 30.0  # RGB distance within which a core is a mixture of its larger neighbour's colour and the background
MIN_AREA = 0.75 * np.array([smallest_area(shape) for shape in SHAPES]) * SIDE**2  # pixels, per shape
MAX_SIDE = 40.0  # pixels, longer side of the box; the largest object of the world has 30

FEATURES = ("compactness", "extent", "lean", "fourfold")
CENTROIDS = np.array(  # mean features of SHAPES; tests/shapes/test_detector.py calibrates both on rendered scenes
    [[0.992, 0.787, 0.0, 0.003], [0.956, 0.97, 0.0, -0.497], [0.851, 0.615, -0.491, 0.005], [0.879, 0.588, 0.0, 0.709]]
)
SPREAD = np.array([0.0125, 0.037, 0.0305, 0.0465])  # standard deviation of the features within a shape
RECENT = 4096  # images whose analysis is kept, so that several measures of the same images share it
LIMIT = 10.0  # spreads from the nearest centroid; forms beyond are rejected (99 % are within 8.3 after JPEG 50)


_recent: dict[tuple[tuple[int, ...], bytes], "Analysis"] = {}  # an image's size and digest -> analysis, latest last


class Regions(NamedTuple):
    """Measured regions at SIDE, before classification."""

    color: Int  # (N,) into COLORS
    area: Float  # (N,) pixels
    box: Float  # (N, 4) x0, y0, x1, y1 in pixels
    center: Float  # (N, 2) x, y of the centroid in pixels
    features: Float  # (N, F)


class Analysis(NamedTuple):
    """What an image holds."""

    objects: tuple[Object, ...]  # the largest first
    debris: int  # pixels at SIDE that neither the objects nor the background explain


class ShapesDetector(Detector):
    """Detects the world's objects with label, box and colour; the score is the fraction of the image covered."""

    labels = SHAPES
    title = "shapes"
    names_colors = True

    def detect(self, image: Tensor | NDArray[np.uint8]) -> list[Object]:
        """Objects in a uint8 (3, H, W) image, the largest first. Forms that match none of SHAPES are omitted."""
        return list(analyse(image).objects)

    def identity(self) -> Json:
        return {"detector": "shapes", "side": SIDE, "limit": LIMIT}

    def prompts(self, per_task: int, seed: int) -> list[Json]:
        return prompts.prompts(per_task, seed, classes=SHAPES)


def analyse(image: Tensor | NDArray[np.uint8]) -> Analysis:
    """Objects and debris of a uint8 (3, H, W) image; of the latest RECENT images, without repeating the work."""
    pixels = _checked(image)
    key = (pixels.shape, hashlib.blake2b(pixels.tobytes()).digest())
    result = _recent.pop(key, None) or _analysed(pixels)
    _recent[key] = result
    if len(_recent) > RECENT:
        del _recent[next(iter(_recent))]
    return result


def _analysed(image: NDArray[np.uint8]) -> Analysis:
    rgb, scale = _resized(image)
    regions, smooth = measure(rgb), scipy.ndimage.gaussian_filter(rgb, (BLUR, BLUR, 0))
    names, distance = classify(regions.features)
    valid = (regions.area >= MIN_AREA[names]) & (_longer_side(regions.box) <= MAX_SIDE) & (distance <= LIMIT)
    order = sorted(np.nonzero(valid)[0].tolist(), key=lambda i: -regions.area[i])
    pixels = rgb.shape[0] * rgb.shape[1]
    objects = tuple(
        Object(
            SHAPES[names[i]],
            _tuple(regions.box[i] * scale),
            float(regions.area[i] / pixels),
            COLORS[regions.color[i]],
        )
        for i in order
    )
    return Analysis(objects, debris(smooth, Forms(names[order], regions.center[order], regions.area[order]), BLUR))


def classify(features: Float) -> tuple[Int, Float]:
    """(N,) indices of the nearest of SHAPES and the distances in spreads."""
    distances = np.linalg.norm((features[:, None] - CENTROIDS) / SPREAD, axis=-1)
    return distances.argmin(1), distances.min(1)


def _checked(image: Tensor | NDArray[np.uint8]) -> NDArray[np.uint8]:
    pixels = torch.as_tensor(image)
    if pixels.ndim != 3 or pixels.shape[0] != 3 or pixels.dtype != torch.uint8:
        raise ValueError(f"the detector takes one uint8 image (3, H, W); given {pixels.dtype} {tuple(pixels.shape)}")
    array: NDArray[np.uint8] = pixels.cpu().numpy()
    return array


def _resized(image: NDArray[np.uint8]) -> tuple[Float, float]:
    """(h, w, 3) in [0, 255] with the shorter side at SIDE, and the scale from its pixels to the image's."""
    height, width = image.shape[1:]
    scale = min(height, width) / SIDE
    if scale == 1:
        return image.transpose(1, 2, 0).astype(np.float64), scale
    size = [round(height / scale), round(width / scale)]
    pixels = interpolate(torch.from_numpy(image)[None].float(), size, mode="bilinear", antialias=True)[0]
    return pixels.numpy().transpose(1, 2, 0).astype(np.float64), scale


def _longer_side(box: Float) -> Float:
    return (box[:, 2:] - box[:, :2]).max(-1, initial=0)


def _tuple(box: Float) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = box.tolist()
    return x0, y0, x1, y1


# --- measuring ------------------------------------------------------------------------------------------------------


def measure(rgb: Float) -> Regions:
    """Regions with a flat patch of one colour in an (H, W, 3) image in [0, 255]."""
    smooth = scipy.ndimage.gaussian_filter(rgb, (BLUR, BLUR, 0))
    colors = nearest_colors(smooth)
    flat = scipy.ndimage.minimum_filter(colors, 3) == scipy.ndimage.maximum_filter(colors, 3)
    cores = _without_rims(label(np.where(flat, colors, -1), background=-1, connectivity=1), smooth)
    owner, cover = _cover(cores, smooth)
    first = [int(np.argmax(cores == i)) for i in range(1, cores.max() + 1)]
    box = _boxes(np.where(cover > 0.5, owner, 0), len(first))
    area, center, features = _moments(owner, cover, box)
    return Regions(colors.ravel()[first].astype(np.int64), area, box, center, features)


def nearest_colors(rgb: Float) -> NDArray[np.int8]:
    """(H, W) into COLORS, -1 for the background, from (H, W, 3) in [0, 255]; exact to 5 bits per channel."""
    r, g, b = np.moveaxis(rgb, -1, 0).clip(0, 255).astype(np.int64) >> 3
    return _lookup()[r, g, b]


@cache
def _lookup() -> NDArray[np.int8]:
    """(32, 32, 32) indices of the nearest of COLORS in Lab to the centre of each 5-bit RGB cell, -1: background."""
    grid = (np.stack(np.meshgrid(*[np.arange(32)] * 3, indexing="ij"), -1) * 8 + 4) / 255
    targets = rgb2lab(np.array([*PALETTE.values(), BACKGROUND])[None] / 255)[0]
    nearest = ((rgb2lab(grid)[..., None, :] - targets) ** 2).sum(-1).argmin(-1)
    return np.where(nearest == len(COLORS), -1, nearest).astype(np.int8)


def _without_rims(cores: Int, smooth: Float) -> Int:
    """Cores 1 ... N without those that are a larger neighbour's edge, its colour mixed with the background."""
    area, mean = np.bincount(cores.ravel()), _means(cores, smooth)
    rim = np.zeros(len(area), bool)
    for j in 1 + np.argsort(-area[1:], kind="stable"):
        if not rim[j]:
            near = np.unique(cores[scipy.ndimage.binary_dilation(cores == j, iterations=3)])
            smaller = near[(near > 0) & (area[near] <= area[j]) & (near != j)]
            rim[smaller] |= _residual(mean[smaller], mean[j]) < RIM
    return np.where(rim, 0, np.cumsum(~rim) - 1)[cores]


def _means(regions: Int, values: Float) -> Float:
    """(N + 1, 3) mean of (H, W, 3) values over each region, less the background's colour."""
    flat = regions.ravel()
    sums = [np.bincount(flat, values[..., channel].ravel()) for channel in range(3)]
    return np.stack(sums, -1) / np.maximum(np.bincount(flat), 1)[:, None] - BACKGROUND


def _residual(colors: Float, pure: Float) -> Float:
    """RGB distance from each colour to the segment between the background (zero) and a pure colour."""
    fraction = np.clip(colors @ pure / (pure @ pure), 0, 1)
    return np.linalg.norm(colors - fraction[:, None] * pure, axis=1)


def _cover(cores: Int, smooth: Float) -> tuple[Int, Float]:
    """(H, W) label of the nearest core, 0 beyond REACH, and coverage of the pixel by its object, in [0, 1]."""
    distance, (rows, columns) = scipy.ndimage.distance_transform_edt(cores == 0, return_indices=True)
    owner = np.where(distance <= REACH, cores[rows, columns], 0)
    pure = _means(cores, smooth)[owner]
    fraction = ((smooth - BACKGROUND) * pure).sum(-1) / np.maximum((pure**2).sum(-1), 1)
    cover = np.clip(2 * fraction - 0.5, 0, 1) * (owner > 0)  # steeper than the edge: undoes part of BLUR
    parts = label(np.where(cover > 0.5, owner, 0), background=0, connectivity=1)
    attached = np.isin(parts, np.unique(parts[cores > 0])) & (parts > 0)
    return owner, cover * scipy.ndimage.binary_dilation(attached)


def _boxes(masks: Int, n: int) -> Float:
    """(N, 4) x0, y0, x1, y1 around each label; zeros for an absent label."""
    slices = scipy.ndimage.find_objects(masks, n)
    boxes = [(0, 0, 0, 0) if at is None else (at[1].start, at[0].start, at[1].stop, at[0].stop) for at in slices]
    return np.array(boxes, np.float64).reshape(-1, 4)


def _moments(owner: Int, cover: Float, box: Float) -> tuple[Float, Float, Float]:
    """Area (N,), centroid (N, 2) and FEATURES (N, F), which are invariant to position and size.

    Compactness A / (2 pi s) with s the mean square radius (1 for a disc, 3/pi for a square, 0.827 for an equilateral
    triangle); extent, area over the area of the box; lean, the skewness along y; fourfold, the mean of
    r^4 cos(4 theta) / s^2.
    """
    flat, weight, n = owner.ravel(), cover.ravel(), len(box) + 1
    ys, xs = np.indices(owner.shape, np.float64).reshape(2, -1)
    area = np.maximum(np.bincount(flat, weight, n), 1.0)

    def mean(values: Float) -> Float:
        return np.bincount(flat, weight * values, n) / area

    center = np.stack([mean(xs), mean(ys)], -1)
    x, y = xs - center[flat, 0], ys - center[flat, 1]
    s, t = np.maximum(mean(x**2 + y**2), 1e-3), np.maximum(mean(y**2), 1e-3)
    extent = area / np.maximum(np.concatenate([[0], (box[:, 2:] - box[:, :2]).prod(-1)]), 1)
    fourfold = mean(x**4 - 6 * x**2 * y**2 + y**4) / s**2
    features = np.stack([area / (2 * np.pi * s), extent, mean(y**3) / t**1.5, fourfold], -1)
    return area[1:], center[1:] + 0.5, features[1:]
