"""Reconstruction quality of an autoencoder: PSNR, SSIM, LPIPS and rFID, per image and in total, and its worst cases.

Shapes: B images, H x W pixels. Values are those of 8-bit images, [0, 255], in float64.
"""

import heapq
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import resize, to_pil_image
from torchvision.utils import make_grid

from sana_lab.config.atomic_write import replacing
from sana_lab.evaluation import Extractor
from sana_lab.evaluation.distances.frechet import frechet_rows, influence
from sana_lab.evaluation.distances.moments import moments
from sana_lab.evaluation.image_files import TOLERATED, Skipped, find_images
from sana_lab.evaluation.image_files import batches as image_batches
from sana_lab.intervals import Estimate, bootstrap_mean, jackknife
from sana_lab.models.autoencoders import Autoencoder
from sana_lab.models.autoencoders.losses import Lpips
from sana_lab.types import Batch, Json

WINDOW, SIGMA = 11, 1.5
"""Width in pixels and standard deviation of SSIM's Gaussian window."""

PIXELS = 2**22
"""Images of a folder are reconstructed about this many pixels at a time: 16 of 512 pixels, one of 2160."""

PADDING = "edge pixels repeated to the right and below, up to a multiple of {}; scored on the image's own pixels"
PSNR = "of 8-bit RGB; the mean is over images; an exact image counts as if one of its values were off by one"
SSIM = "of 8-bit RGB, 11 x 11 Gaussian window of deviation 1.5 within the image, mean over colours"


class Options(NamedTuple):
    """Metrics besides PSNR and SSIM, and the image of the worst cases."""

    lpips: Lpips | None = None
    extractor: Extractor | None = None  # for rFID
    worst: int = 0  # number of cases
    picture: Path | None = None  # a .png of them


class Group(NamedTuple):
    """Images of one size."""

    names: list[str]
    images: Tensor  # (B, 3, H, W) in [-1, 1]


class Case(NamedTuple):
    """One image and its reconstruction."""

    psnr: float  # dB
    name: str
    image: Tensor  # (3, H, W) uint8
    reconstruction: Tensor  # (3, H, W) uint8


class ScoredGroup(NamedTuple):
    """A group after the round trip."""

    names: list[str]
    scores: dict[str, Tensor]  # metric -> (B,) float64
    features: tuple[Tensor, Tensor] | None  # (B, D) of images and of reconstructions
    worst: list[Case]


def evaluate_reconstruction(
    autoencoder: Autoencoder, batches: Iterable[Batch], limit: int | None = None, options: Options | None = None
) -> Json:
    """Every metric over the first `limit` images: means, 95 % intervals over images, n, and values per image.

    Outputs are rounded to 8 bits first. ValueError without images, or for data that yields latents only.
    """
    return _evaluate(autoencoder, _groups(batches, limit), options or Options())


def evaluate_folder(
    autoencoder: Autoencoder,
    folder: str | Path,
    limit: int | None = None,
    options: Options | None = None,
    *,
    batch: int = 16,
    tolerated: float = TOLERATED,
) -> Json:
    """Every metric over the first `limit` image files below a folder, each at its own size; `skipped` names the others.

    ValueError without images, or where more than the share `tolerated` is unreadable or too small.
    """
    options, skipped = options or Options(), Skipped(folder, tolerated)
    min_side = max(WINDOW, 0 if options.lpips is None else options.lpips.min_size)
    batches = image_batches(find_images(folder)[:limit], batch, skipped, min_side)
    groups = (group for images, files in batches for group in _bounded([file.name for file in files], images))
    return {**_evaluate(autoencoder, groups, options), "folder": str(folder), "skipped": skipped.reasons}


def _bounded(names: list[str], images: Tensor) -> Iterator[Group]:
    """Images (B, 3, H, W) uint8 of one size in groups of at most PIXELS, or one by one."""
    n = max(1, PIXELS // (images.shape[-2] * images.shape[-1]))
    for first in range(0, len(names), n):
        yield Group(names[first : first + n], images[first : first + n].float() / 127.5 - 1)


# --- metrics --------------------------------------------------------------------------------------------------------


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,) in dB of image pairs (B, 3, H, W) in [0, 255]; infinite for equal images."""
    error = (a.double() - b.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(255**2 / error)


def finite_psnr(a: Tensor, b: Tensor) -> Tensor:
    """PSNR (B,), at most that of a single value off by one."""
    return psnr(a, b).clamp(max=10 * math.log10(255**2 * a[0].numel()))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (B,) of image pairs (B, 3, H, W) in [0, 255]: the mean over colours and inner windows.

    Wang et al. 2004, as scikit-image measures it: 11 x 11 Gaussian window of deviation 1.5, K1 = 0.01, K2 = 0.03.
    ValueError below 11 pixels.
    """
    if min(a.shape[-2:]) < WINDOW:
        raise ValueError(f"SSIM needs images of at least {WINDOW}x{WINDOW}; given {a.shape[-2]}x{a.shape[-1]}")
    a, b = a.double(), b.double()
    mean_a, mean_b = _blur(a), _blur(b)
    var_a, var_b = _blur(a * a) - mean_a**2, _blur(b * b) - mean_b**2
    covariance = _blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (var_a + var_b + c2)
    return (luminance * structure).flatten(1).mean(1)


def _blur(x: Tensor) -> Tensor:
    """Gaussian means over the windows inside the image: (B, C, H, W) -> (B, C, H - 10, W - 10)."""
    at = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    kernel = torch.exp(-(at**2) / (2 * SIGMA**2))
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, 1, WINDOW)
    rows = F.conv2d(x, kernel, groups=x.shape[1])
    return F.conv2d(rows, kernel.mT, groups=x.shape[1])


def rfid(images: Tensor, reconstructions: Tensor) -> tuple[Estimate, list[float]]:
    """Fréchet distance of features (n, D) of images and of their reconstructions, and its values per image.

    An image and its reconstruction are one observation, so both influences add. ValueError below two images.
    """
    if len(images) < 2:
        raise ValueError(f"rFID needs at least two images; given {len(images)}")
    a, b = moments(images).gaussian(), moments(reconstructions).gaussian()
    value = frechet_rows(reconstructions, a)
    influences = influence(reconstructions, a) + influence(images, b)
    return jackknife(value, influences), (value + influences).tolist()


# --- round trip -----------------------------------------------------------------------------------------------------


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> 0 ... 255, rounded and clipped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def pad(images: Tensor, multiple: int) -> Tensor:
    """(B, 3, H, W) with edge pixels repeated to the right and below until both sides are multiples."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % multiple, 0, -height % multiple), mode="replicate")


@torch.no_grad()
def round_trip(autoencoder: Autoencoder, images: Tensor) -> Tensor:
    """Reconstructions of images (B, 3, H, W) in [-1, 1] of any size, in evaluation mode, on its device."""
    like, training = next(autoencoder.parameters()), autoencoder.training
    autoencoder.eval()
    try:
        output = autoencoder.decode(autoencoder.encode(pad(images, autoencoder.downsample).to(like)))
    finally:
        autoencoder.train(training)
    return output[..., : images.shape[-2], : images.shape[-1]].to(images.device)


def _groups(batches: Iterable[Batch], limit: int | None) -> Iterator[Group]:
    """The first `limit` images of a stream, named by their index."""
    n, limit = 0, sys.maxsize if limit is None else limit
    for batch in batches:
        if batch.images is None:
            raise ValueError("a reconstruction is measured on images; this data yields latents only")
        images = batch.images[: limit - n]
        yield Group([str(n + i) for i in range(len(images))], images)
        n += len(images)
        if n >= limit:
            return


def _score(autoencoder: Autoencoder, groups: Iterable[Group], options: Options) -> Iterator[ScoredGroup]:
    device = next(autoencoder.parameters()).device
    lpips = None if options.lpips is None else options.lpips.to(device)
    for names, images in groups:
        pair = to_uint8(images), to_uint8(round_trip(autoencoder, images))
        scores = {"psnr": finite_psnr(*pair), "ssim": ssim(*pair)}
        if lpips is not None:
            scores["lpips"] = _lpips(lpips, *(side.to(device) for side in pair)).double().to(images.device)
        extract = None if options.extractor is None else options.extractor.features
        features = None if extract is None else (extract(pair[0]).cpu(), extract(pair[1]).cpu())
        cases = (Case(*row) for row in zip(scores["psnr"].tolist(), names, *pair, strict=True))
        yield ScoredGroup(names, scores, features, worst_cases(cases, options.worst))


@torch.no_grad()
def _lpips(lpips: Lpips, a: Tensor, b: Tensor) -> Tensor:
    return lpips(a.float() / 127.5 - 1, b.float() / 127.5 - 1)


# --- report ---------------------------------------------------------------------------------------------------------


def _evaluate(autoencoder: Autoencoder, groups: Iterable[Group], options: Options) -> Json:
    names: list[str] = []
    values: dict[str, list[float]] = {}
    features: list[tuple[Tensor, Tensor]] = []
    cases: list[Case] = []
    for group in _score(autoencoder, groups, options):
        names += group.names
        for name, scores in group.scores.items():
            values.setdefault(name, []).extend(scores.tolist())
        features += [group.features] if group.features else []
        cases = worst_cases([*cases, *group.worst], options.worst)
    if not names:
        raise ValueError("there are no images to measure a reconstruction on")
    estimates = {name: _mean(scores) for name, scores in values.items()}
    if options.extractor is not None:
        estimates["rfid"], values["rfid"] = rfid(*(torch.cat(side) for side in zip(*features, strict=True)))
    if options.picture is not None and cases:
        save_cases(cases, options.picture)
    return {
        **{name: estimate.value for name, estimate in estimates.items()},
        **{f"{name}_interval": [estimate.low, estimate.high] for name, estimate in estimates.items()},
        "n": len(names),
        "per_image": values,
        "names": names,
        "worst": [{"name": case.name, "psnr": case.psnr} for case in cases],
        "settings": _settings(autoencoder, options, features),
    }


def _mean(values: Sequence[float]) -> Estimate:
    """Bootstrap interval; above 5,000 images, for which it needs gigabytes, the (agreeing) normal interval."""
    if len(values) <= 5000:
        return bootstrap_mean(values)
    column = torch.tensor(values, dtype=torch.float64)
    return jackknife(float(column.mean()), column - column.mean())


def _settings(autoencoder: Autoencoder, options: Options, features: Sequence[tuple[Tensor, Tensor]]) -> Json:
    settings: Json = {"padding": PADDING.format(autoencoder.downsample), "psnr": PSNR, "ssim": SSIM}
    settings["dtype"] = str(next(autoencoder.parameters()).dtype).removeprefix("torch.")
    if options.lpips is not None:
        settings["lpips"] = options.lpips.identity()
    if options.extractor is not None:
        size = sum(side.numel() * side.element_size() for pair in features for side in pair)
        settings["rfid"] = {**options.extractor.identity(), "features_kept_mib": size / 2**20}
    return settings


# --- worst cases ----------------------------------------------------------------------------------------------------

AMPLIFICATION = 4
"""Factor of the absolute difference in the picture of the worst cases."""

MAX_SIDE, GAP, TEXT_HEIGHT = 512, 8, 20
"""Pixels: the longer side of an image, the space between images, the height of a line of text."""


def worst_cases(cases: Iterable[Case], n: int) -> list[Case]:
    """The n cases of the lowest PSNR, the worst first."""
    return heapq.nsmallest(n, cases, key=lambda case: (case.psnr, case.name))


def save_cases(cases: Sequence[Case], path: Path) -> None:
    """Write a PNG with one row per case."""
    rows = [render_case(case) for case in cases]
    canvas, top = Image.new("RGB", (max(r.width for r in rows), sum(r.height for r in rows)), "white"), 0
    for row in rows:
        canvas.paste(row, (0, top))
        top += row.height
    with replacing(path) as partial:
        canvas.save(partial, "PNG")


def render_case(case: Case) -> Image.Image:
    """Image, reconstruction and amplified difference side by side, at most MAX_SIDE each, with the caption below."""
    views = torch.stack([case.image, case.reconstruction, difference(case.image, case.reconstruction)]).cpu()
    height, width = views.shape[-2:]
    if (scale := MAX_SIDE / max(height, width)) < 1:
        views = resize(views, [max(1, round(height * scale)), max(1, round(width * scale))])
    grid = to_pil_image(make_grid(views, nrow=3, padding=GAP, pad_value=255))
    text, font = caption(case), ImageFont.load_default(12)
    canvas = Image.new(
        "RGB", (max(grid.width, 2 * GAP + int(font.getlength(text))), grid.height + TEXT_HEIGHT), "white"
    )
    canvas.paste(grid)
    ImageDraw.Draw(canvas).text((GAP, grid.height), text, "black", font)
    return canvas


def caption(case: Case) -> str:
    """File name, PSNR and legend; letters that the font lacks become question marks."""
    name = case.name.encode("latin-1", "replace").decode("latin-1")
    return f"{name}   {case.psnr:.2f} dB   original | reconstruction | difference x {AMPLIFICATION}"


def difference(a: Tensor, b: Tensor) -> Tensor:
    """|a - b| x AMPLIFICATION, at most 255: (3, H, W) uint8."""
    return ((a.int() - b.int()).abs() * AMPLIFICATION).clamp(max=255).byte()
