"""The exact judge: its bars on clean renders, what lossy pictures do to it, and what it must not see."""

import io
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from skimage.color import rgb2lab
from tiny_world import pack

from sana_lab.shapes import detector
from sana_lab.shapes import scenes as world
from sana_lab.shapes.detector import ShapesDetector
from sana_lab.types import Object

Picture = NDArray[np.uint8]


def blurred(image: Picture, sigma: float) -> Picture:
    return ndimage.gaussian_filter(image.astype(float), (0, sigma, sigma)).round().astype(np.uint8)


def noisy(image: Picture, sigma: float) -> Picture:
    noise = np.random.default_rng(int(image.sum())).normal(0, sigma, image.shape)
    return (image + noise).round().clip(0, 255).astype(np.uint8)


def jpeg(image: Picture, quality: int) -> Picture:
    file = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(file, "JPEG", quality=quality)
    return np.array(Image.open(file)).transpose(2, 0, 1)


def middle(thing: Object) -> NDArray[np.float64]:
    return np.reshape(thing.box, (2, 2)).mean(0)


def accuracies(images: Picture, rows: world.Scenes) -> tuple[float, float, float]:
    """Shares of scenes with the right count, and of objects with the right colour and the right shape."""
    size, counts, colors, shapes = images.shape[-1], [], [], []
    for i, image in enumerate(images):
        seen, truth = ShapesDetector().detect(image), world.objects(world.scene(rows, i), images.shape[-1])
        counts.append(len(seen) == len(truth))
        for thing in truth:
            near = [o for o in seen if np.abs(middle(o) - middle(thing)).max() < size / 16]
            colors.append([o.color for o in near] == [thing.color])
            shapes.append([o.label for o in near] == [thing.label])
    return float(np.mean(counts)), float(np.mean(colors)), float(np.mean(shapes))


def test_clean_renders() -> None:
    rows = world.scenes(12, range(1000))
    count, color, shape = accuracies(world.render(rows, 64), rows)
    assert count == 1
    assert color >= 0.999
    assert shape >= 0.99


@pytest.mark.parametrize("size", [32, 96, 128])
def test_other_sizes(size: int) -> None:
    rows = world.scenes(13, range(60))
    assert min(accuracies(world.render(rows, size), rows)) >= 0.99


@pytest.mark.parametrize(
    ("spoil", "least"),
    [
        (lambda x: blurred(x, 1), 0.99),
        (lambda x: blurred(x, 1.5), 0.99),
        (lambda x: noisy(x, 10), 0.99),
        (lambda x: noisy(x, 20), 0.99),
        (lambda x: jpeg(x, 75), 0.98),
        (lambda x: jpeg(x, 50), 0.96),
        (lambda x: jpeg(noisy(blurred(x, 1), 10), 50), 0.95),
    ],
    ids=["blur 1", "blur 1.5", "noise 10", "noise 20", "jpeg 75", "jpeg 50", "all three"],
)
def test_spoiled_pictures(spoil: Callable[[Picture], Picture], least: float) -> None:
    rows = world.scenes(14, range(120))
    images = np.stack([spoil(image) for image in world.render(rows, 64)])
    assert min(accuracies(images, rows)) >= least


def picture(*things: world.Thing) -> Picture:
    return world.render(pack([world.Scene("mixed", things)]), 64)[0]


def test_objects_are_measured_in_given_pixels_and_largest_first() -> None:
    small = world.Thing("circle", "blue", (0.25, 0.25), 8 / 64)
    large = world.Thing("square", "orange", (0.7, 0.6), 13 / 64)
    for size in (64, 128):
        image = world.render(pack([world.Scene("pair", (small, large))]), size)[0]
        seen = ShapesDetector().detect(torch.from_numpy(image))
        truth = world.objects(world.Scene("pair", (small, large)), size)
        assert [(o.label, o.color) for o in seen] == [("square", "orange"), ("circle", "blue")]
        for found, real in zip(seen, truth, strict=True):
            assert np.abs(np.subtract(found.box, real.box)).max() < 1.5 * size / 64
            assert found.score == pytest.approx(real.score, rel=0.05)


@pytest.mark.parametrize(("a", "b"), list(itertools.permutations(world.COLORS, 2))[::7])
def test_close_objects_of_any_two_colors_are_told_apart(a: str, b: str) -> None:
    image = picture(
        world.Thing("circle", a, (20 / 64, 0.5), 9 / 64), world.Thing("square", b, (41.5 / 64, 0.5), 9 / 64)
    )
    for seen in (ShapesDetector().detect(image), ShapesDetector().detect(blurred(image, 1))):
        assert {(o.label, o.color) for o in seen} == {("circle", a), ("square", b)}


def test_touching_objects_of_different_colors_are_two() -> None:
    image = picture(world.Thing("square", "red", (0.35, 0.5), 12 / 64))
    image[:, 24:41, 31:47] = np.array(world.PALETTE["blue"])[:, None, None]
    assert {o.color for o in ShapesDetector().detect(image)} == {"red", "blue"}


@pytest.mark.parametrize("color", world.COLORS)
def test_rims_are_not_objects(color: str) -> None:
    image = blurred(picture(world.Thing("circle", color, (0.5, 0.5), 15 / 64)), 2.5)
    assert [(o.label, o.color) for o in ShapesDetector().detect(image)] == [("circle", color)]


def test_what_is_no_object_is_not_seen() -> None:
    rng = np.random.default_rng(0)
    plain = np.full((3, 64, 64), 153, np.uint8)
    red = np.array(world.PALETTE["red"], np.uint8)[:, None, None]
    speck, slab, bar = plain.copy(), plain.copy(), plain.copy()
    speck[:, 30:34, 30:34], slab[:, :, :], bar[:, 30:35, 10:45] = red, red, red
    noise = rng.integers(0, 256, (3, 64, 64)).astype(np.uint8)
    for image in (plain, speck, slab, bar, noise):
        assert ShapesDetector().detect(image) == []


def test_forms_that_are_none_of_the_shapes_have_no_name() -> None:
    ys, xs = np.mgrid[:64, :64] - 31.5
    away = np.hypot(xs, ys)
    ring, bar = (away < 14) & (away > 8), (np.abs(xs) < 14) & (np.abs(ys) < 4)
    corner = (np.abs(xs) < 12) & (np.abs(ys) < 12) & ((xs < -5) | (ys > 5))
    for form in (ring, bar, corner):
        image = np.where(form, np.array(world.PALETTE["blue"])[:, None, None], 153).astype(np.uint8)
        assert ShapesDetector().detect(image) == []
    triangle = picture(world.Thing("triangle", "green", (0.5, 0.5), 12 / 64))
    assert len(ShapesDetector().detect(triangle)) == 1
    assert ShapesDetector().detect(triangle[:, ::-1].copy()) == []


def test_nearest_colors_agree_with_lab_distance() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(float)
    distances = (
        (rgb2lab(rgb / 255)[..., None, :] - rgb2lab(np.array([*world.PALETTE.values()])[None] / 255)) ** 2
    ).sum(-1)
    ground = ((rgb2lab(rgb / 255) - rgb2lab(np.array([[world.BACKGROUND]]) / 255)) ** 2).sum(-1)
    exact = np.where(distances.min(-1) < ground, distances.argmin(-1), -1)
    assert (detector.nearest_colors(rgb) == exact).mean() > 0.95  # 5 bits decide, so cells on a border may differ
    pure = np.array([*world.PALETTE.values(), world.BACKGROUND], float)[None]
    assert detector.nearest_colors(pure).tolist() == [[*range(10), -1]]


def calibrate(n: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """CENTROIDS (shapes, F) and SPREAD (F,) over n scenes, each seen clean, blurred (1.5 px) and noisy (20 of 255)."""
    rows = world.scenes(seed, range(n))
    clean = world.render(rows, detector.SIDE).transpose(0, 2, 3, 1).astype(np.float64)
    blurred = ndimage.gaussian_filter(clean, (0, 1.5, 1.5, 0))
    noisy = (clean + np.random.default_rng(seed).normal(0, 20, clean.shape)).clip(0, 255)
    groups: list[list[NDArray[np.float64]]] = [[] for _ in world.SHAPES]
    for images in (clean, blurred, noisy):
        for i, image in enumerate(images):
            regions = detector.measure(image)
            center = (regions.box[:, :2] + regions.box[:, 2:]) / 2 / detector.SIDE
            for m in range(rows.count[i]):
                nearest = np.linalg.norm(center - rows.center[i, m], axis=-1).argmin()
                groups[rows.shape[i, m]].append(regions.features[nearest])
    means = np.array([np.mean(group, 0) for group in groups])
    return means, np.sqrt(np.mean([np.var(group, 0) for group in groups], 0))


def test_centroids_are_calibrated() -> None:
    centroids, spread = calibrate(150, seed=6)
    assert np.abs((centroids - detector.CENTROIDS) / detector.SPREAD).max() < 0.5
    assert np.abs(spread / detector.SPREAD - 1).max() < 0.25


def test_features_of_ideal_forms() -> None:
    compactness = dict(zip(world.SHAPES, detector.CENTROIDS[:, 0], strict=True))
    assert compactness["circle"] == pytest.approx(1, abs=0.02)
    assert compactness["square"] == pytest.approx(3 / np.pi, abs=0.01)
    assert compactness["triangle"] == pytest.approx(3 * 3**0.5 / (2 * np.pi), abs=0.03)


@pytest.mark.parametrize(
    "image", [np.zeros((64, 64, 3), np.uint8), torch.zeros(3, 64, 64), torch.zeros(1, 3, 64, 64, dtype=torch.uint8)]
)
def test_other_than_one_uint8_image_is_refused(image: torch.Tensor | Picture) -> None:
    with pytest.raises(ValueError, match=r"one uint8 image \(3, H, W\); given"):
        ShapesDetector().detect(image)
