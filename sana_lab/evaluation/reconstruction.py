"""How well an autoencoder gives images back: PSNR, SSIM, LPIPS and rFID, per image and in total, and its worst cases.

Shapes: B images, H x W pixels. Values are those of 8-bit images, [0, 255], in float64.
"""

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sana_lab.data.images import SUFFIXES, UnreadableError, read
from sana_lab.evaluation import Extractor
from sana_lab.evaluation.distances.frechet import frechet_rows, influence
from sana_lab.evaluation.distances.moments import moments
from sana_lab.evaluation.worst import Case, draw, worst_of
from sana_lab.intervals import Estimate, bootstrap_mean, jackknife
from sana_lab.models.autoencoders import Autoencoder
from sana_lab.models.autoencoders.losses import Lpips
from sana_lab.types import Batch, Json

WINDOW, SIGMA = 11, 1.5
"""Width in pixels and deviation of SSIM's Gaussian window."""

PADDING = "edge pixels repeated to the right and below, up to a multiple of {}; scored on the image's own pixels"
PSNR = "of 8-bit RGB; the mean is over images; an exact image counts as if one of its values were off by one"
SSIM = "of 8-bit RGB, 11 x 11 Gaussian window of deviation 1.5 within the image, mean over colours"


class Group(NamedTuple):
    """Images of one size."""

    names: list[str]
    images: Tensor  # (B, 3, H, W) in [-1, 1]


class Suite(NamedTuple):
    """What is measured beside PSNR and SSIM, and how many of the worst cases are drawn, and where."""

    lpips: Lpips | None = None
    extractor: Extractor | None = None  # for rFID
    worst: int = 0
    picture: Path | None = None  # a .png


class Scored(NamedTuple):
    """A group after the round trip."""

    names: list[str]
    values: dict[str, Tensor]  # (B,) float64 each
    features: tuple[Tensor, Tensor] | None  # (B, D), of images and of what came back
    cases: list[Case]  # the worst of the group


class Scores(NamedTuple):
    """Per image, float64."""

    psnr: Tensor  # (B,) dB
    ssim: Tensor  # (B,) at most 1


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image pair (B, 3, H, W) in [0, 255], in dB; infinite where they are equal."""
    error = (a.double() - b.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(255**2 / error)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each image pair (B, 3, H, W) in [0, 255]: the mean over colours and windows within.

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


def score(images: Tensor, others: Tensor) -> Scores:
    """PSNR (at most that of a single value off by one) and SSIM of uint8 images (B, 3, H, W)."""
    most = 10 * math.log10(255**2 * images[0].numel())
    return Scores(psnr(images, others).clamp(max=most), ssim(images, others))


def evaluate_reconstruction(
    autoencoder: Autoencoder, batches: Iterable[Batch], limit: int | None = None, suite: Suite | None = None
) -> Json:
    """Every measure over the first `limit` images: means, 95 % intervals over images, n, and all of them per image.

    Outputs are rounded to 8 bits first. ValueError without images, or where the data gives latents only.
    """
    return _evaluate(autoencoder, _numbered(batches, limit), suite or Suite())


def evaluate_folder(
    autoencoder: Autoencoder,
    folder: str | Path,
    limit: int | None = None,
    suite: Suite | None = None,
    *,
    batch: int = 16,
    tolerated: float = 0.05,
) -> Json:
    """The same of the first `limit` image files below a folder, each at its own size; `skipped` names the others.

    Neighbours of one size share a batch. ValueError where there are no images, or more than the share `tolerated`
    cannot be read or are too small to be measured.
    """
    suite, skipped = suite or Suite(), Skipped(str(folder), tolerated)
    groups = _read(Path(folder), files(folder)[:limit], batch, _least(suite), skipped)
    return {**_evaluate(autoencoder, groups, suite), "folder": str(folder), "skipped": skipped.names}


class Skipped:
    """Files that were left out, and why; ValueError as soon as they are too many."""

    def __init__(self, folder: str, tolerated: float) -> None:
        self.folder, self.tolerated = folder, tolerated
        self.names: dict[str, str] = {}

    def add(self, name: str, why: str, total: int) -> None:
        """Leave out one of `total` files."""
        self.names[name] = why
        if len(self.names) > self.tolerated * total:
            share = f"{len(self.names)} of {total} files, more than {self.tolerated:.0%}"
            raise ValueError(f"{share}, in {self.folder!r} cannot be measured: {_told(self.names)}")


def files(folder: str | Path) -> list[Path]:
    """All image files below a folder, in the order of their names. ValueError where there are none."""
    root = Path(folder)
    found = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        what = "holds no image files" if root.is_dir() else "is no folder"
        raise ValueError(f"{str(folder)!r} {what}; expected files such as *.png or *.jpg")
    return found


def lines(found: Json) -> list[str]:
    """A record for a reader: one line a measure."""
    units = {"psnr": ("PSNR", ".2f", " dB"), "ssim": ("SSIM", ".4f", ""), "lpips": ("LPIPS", ".4f", "")}
    units["rfid"] = ("rFID", ".3f", "")
    out = []
    for name, (title, form, unit) in units.items():
        if name in found:
            low, high = (f"{x:{form}}" for x in found[f"{name}_interval"])
            out.append(f"{title:<6}{found[name]:{form}}{unit}  95 % [{low}, {high}]  on {found['n']} images")
    return out


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> 0 ... 255, rounded; what lies outside is clipped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def padded(images: Tensor, multiple: int) -> Tensor:
    """(B, 3, H, W) with edge pixels repeated to the right and below until both sides are multiples."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % multiple, 0, -height % multiple), mode="replicate")


@torch.no_grad()
def round_trip(autoencoder: Autoencoder, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] of any size through the autoencoder in evaluation mode, on its device."""
    like, training = next(autoencoder.parameters()), autoencoder.training
    autoencoder.eval()
    try:
        whole = padded(images, autoencoder.downsample).to(like)
        made = autoencoder.decode(autoencoder.encode(whole))
    finally:
        autoencoder.train(training)
    return made[..., : images.shape[-2], : images.shape[-1]].to(images.device)


def _evaluate(autoencoder: Autoencoder, groups: Iterable[Group], suite: Suite) -> Json:
    names: list[str] = []
    values: dict[str, list[float]] = {}
    features: list[tuple[Tensor, Tensor]] = []
    cases: list[Case] = []
    for names_of, values_of, features_of, cases_of in _scored(autoencoder, groups, suite):
        names += names_of
        for name, value in values_of.items():
            values.setdefault(name, []).extend(value.tolist())
        features += [features_of] if features_of else []
        cases = worst_of([*cases, *cases_of], suite.worst)
    if not names:
        raise ValueError("there are no images to measure a reconstruction on")
    estimates = {name: _mean(value) for name, value in values.items()}
    if suite.extractor is not None:
        estimates["rfid"], values["rfid"] = rfid(*(torch.cat(side) for side in zip(*features, strict=True)))
    if suite.picture is not None and cases:
        draw(cases, suite.picture)
    return {
        **{name: estimate.value for name, estimate in estimates.items()},
        **{f"{name}_interval": [estimate.low, estimate.high] for name, estimate in estimates.items()},
        "n": len(names),
        "per_image": values,
        "names": names,
        "worst": [{"name": case.name, "psnr": case.psnr} for case in cases],
        "settings": _settings(autoencoder, suite, features),
    }


def _scored(autoencoder: Autoencoder, groups: Iterable[Group], suite: Suite) -> Iterator[Scored]:
    device = next(autoencoder.parameters()).device
    lpips = None if suite.lpips is None else suite.lpips.to(device)
    for names, images in groups:
        pair = to_uint8(images), to_uint8(round_trip(autoencoder, images))
        values = score(*pair)._asdict()
        if lpips is not None:
            values["lpips"] = _distances(lpips, *(side.to(device) for side in pair)).double().to(images.device)
        cases = (Case(*row) for row in zip(values["psnr"].tolist(), names, *pair, strict=True))
        yield Scored(names, values, _features(suite.extractor, *pair), worst_of(cases, suite.worst))


def _features(extractor: Extractor | None, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor] | None:
    return None if extractor is None else (extractor.features(a).cpu(), extractor.features(b).cpu())


@torch.no_grad()
def _distances(lpips: Lpips, a: Tensor, b: Tensor) -> Tensor:
    return lpips(a.float() / 127.5 - 1, b.float() / 127.5 - 1)


def rfid(images: Tensor, others: Tensor) -> tuple[Estimate, list[float]]:
    """The Fréchet distance of features (n, D) of images and of their reconstructions, and its value by image.

    An image and its reconstruction are drawn together, so both influences add up. ValueError below two images.
    """
    if len(images) < 2:
        raise ValueError(f"rFID needs at least two images; given {len(images)}")
    left, right = moments(images).gaussian(), moments(others).gaussian()
    value = frechet_rows(others, left)
    moved = influence(others, left) + influence(images, right)
    return jackknife(value, moved), (value + moved).tolist()


def _mean(values: Sequence[float]) -> Estimate:
    """By bootstrap; at many images, where that needs gigabytes and tells the same, by the normal interval."""
    if len(values) <= 5000:
        return bootstrap_mean(values)
    column = torch.tensor(values, dtype=torch.float64)
    return jackknife(float(column.mean()), column - column.mean())


def _settings(autoencoder: Autoencoder, suite: Suite, features: Sequence[tuple[Tensor, Tensor]]) -> Json:
    found: Json = {"padding": PADDING.format(autoencoder.downsample), "psnr": PSNR, "ssim": SSIM}
    found["dtype"] = str(next(autoencoder.parameters()).dtype).removeprefix("torch.")
    if suite.lpips is not None:
        found["lpips"] = suite.lpips.identity()
    if suite.extractor is not None:
        kept = sum(side.numel() * side.element_size() for pair in features for side in pair)
        found["rfid"] = {**suite.extractor.identity(), "features_kept_mib": kept / 2**20}
    return found


def _numbered(batches: Iterable[Batch], limit: int | None) -> Iterator[Group]:
    """Groups until there were `limit` images; a batch's images have one size."""
    seen, limit = 0, sys.maxsize if limit is None else limit
    for batch in batches:
        if batch.images is None:
            raise ValueError("a reconstruction is measured on images; this data yields latents only")
        images = batch.images[: limit - seen]
        yield Group([str(seen + i) for i in range(len(images))], images)
        seen += len(images)
        if seen >= limit:
            return


def _read(root: Path, paths: Sequence[Path], batch: int, least: int, skipped: Skipped) -> Iterator[Group]:
    """Neighbours of one size together, at most `batch`; what cannot be used goes to `skipped`."""
    for _, alike in groupby(_pictures(root, paths, least, skipped), key=lambda pair: pair[1].shape):
        while part := list(islice(alike, batch)):
            names, images = zip(*part, strict=True)
            yield Group(list(names), torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1)


def _pictures(
    root: Path, paths: Sequence[Path], least: int, skipped: Skipped
) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Names and pixels (H, W, 3)."""
    for path in paths:
        name = path.relative_to(root).as_posix()
        try:
            image = read(path)
        except UnreadableError as error:
            skipped.add(name, str(error), len(paths))
            continue
        if min(image.size) < least:
            skipped.add(name, f"{image.width}x{image.height}, below the {least} pixels a side needed", len(paths))
        else:
            yield name, np.asarray(image)


def _told(skipped: dict[str, str], most: int = 5) -> str:
    """Which files were left out and why, the first few."""
    shown = [f"{name!r} ({why})" for name, why in list(skipped.items())[:most]]
    return ", ".join(shown) + (", ..." if len(skipped) > most else "")


def _least(suite: Suite) -> int:
    return max(WINDOW, 0 if suite.lpips is None else suite.lpips.min_size)


def _blur(x: Tensor) -> Tensor:
    """Gaussian means over the windows that lie within the image: (B, C, H, W) -> (B, C, H - 10, W - 10)."""
    at = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    kernel = torch.exp(-(at**2) / (2 * SIGMA**2))
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, 1, WINDOW)
    rows = F.conv2d(x, kernel, groups=x.shape[1])
    return F.conv2d(rows, kernel.mT, groups=x.shape[1])
