"""Fréchet Inception distance (arXiv 1706.08500) with torch-fidelity's Inception, whose weights are given by path.

Shapes: B images, D features.
"""

import hashlib
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
RESIZE = "bilinear to 299x299 as in TensorFlow 1, not antialiased (torch-fidelity)"

Layer = Literal["64", "192", "768", "2048"]
Features = Callable[[Tensor], Tensor]
"""uint8 images (B, 3, H, W) -> (B, D)"""


@dataclass
class Moments:
    """Mean and covariance of rows that come in batches, in float64; sums are of differences to the first row."""

    n: int = 0
    origin: Tensor | None = None  # (D,)
    total: Tensor | None = None  # (D,)
    products: Tensor | None = None  # (D, D)

    def add(self, rows: Tensor) -> None:
        """Take in rows (B, D)."""
        rows = rows.double()
        if self.origin is None or self.total is None or self.products is None:
            self.origin, width = rows[0], rows.shape[1]
            self.total, self.products = rows.new_zeros(width), rows.new_zeros(width, width)
        rows = rows - self.origin
        self.n += len(rows)
        self.total += rows.sum(0)
        self.products += rows.T @ rows

    @property
    def mean(self) -> Tensor:
        """(D,)"""
        assert self.origin is not None
        assert self.total is not None
        return self.origin + self.total / self.n

    @property
    def covariance(self) -> Tensor:
        """(D, D), with n - 1 below."""
        assert self.total is not None
        assert self.products is not None
        return (self.products - torch.outer(self.total, self.total) / self.n) / (self.n - 1)


def frechet(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)); the root's trace by the eigenvalues of A^(1/2) B A^(1/2)."""
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    apart = (a.mean - b.mean).square().sum()
    return float(apart + a.covariance.trace() + b.covariance.trace() - 2 * shared)


def fid(
    real: Iterable[Tensor],
    fake: Iterable[Tensor],
    weights: str | Path,
    *,
    batch: int = 32,
    layer: Layer = "2048",
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """FID between two streams of uint8 images (B, 3, H, W), each read once; with what it was measured.

    FileNotFoundError without weights; ValueError for images of another kind and for fewer than two on a side.
    """
    features = inception(weights, layer, device)
    a, b = (_moments(features, images, batch, side) for images, side in ((real, "real"), (fake, "fake")))
    facts = {"resize": RESIZE, "layer": layer, "extractor_sha256": _sha256(Path(weights))}
    return {"value": frechet(a, b), "n_real": a.n, "n_fake": b.n, **facts}


def inception(weights: str | Path, layer: Layer = "2048", device: torch.device | str = "cpu") -> Features:
    """torch-fidelity's port of the Inception that FID is defined by. FileNotFoundError; ValueError for another file."""
    _check(Path(weights))
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        network = FeatureExtractorInceptionV3("inception", [layer], feature_extractor_weights_path=str(weights))
    except RuntimeError as error:
        raise ValueError(f"{str(weights)!r} holds another network than this Inception; {fid_hint()}") from error
    network.to(device)
    return torch.no_grad()(lambda images: network(images.to(device))[0])


def _check(weights: Path) -> None:
    """A file of tensors and nothing else: torch-fidelity itself would run code that a file holds."""
    if not weights.is_file():
        raise FileNotFoundError(f"there is no Inception at {str(weights)!r}; {fid_hint()}")
    try:
        torch.load(weights, map_location="meta", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{str(weights)!r} is no file of weights; {fid_hint()}") from error


def fid_hint() -> str:
    """How to get the weights, in one line."""
    return f"for FID download {WEIGHTS} from github.com/toshas/torch-fidelity/releases (v0.2.0) and give its path"


def _moments(features: Features, images: Iterable[Tensor], batch: int, side: str) -> Moments:
    moments = Moments()
    for group in images:
        if group.dtype != torch.uint8 or group.ndim != 4 or group.shape[1] != 3:
            raise ValueError(f"{side} images are {tuple(group.shape)} {group.dtype}, expected uint8 (B, 3, H, W)")
        for part in group.split(batch):
            moments.add(features(part))
    if moments.n < 2:
        raise ValueError(f"FID needs at least two {side} images; given {moments.n}")
    return moments


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
