"""Reference statistics: features of real images, computed once and stored in a file.

A safetensors file with `mean` (D,) and `covariance` (D, D) in float64, optionally `features` (n, D) in float32, and a
JSON record in its metadata: sha256 of the images, n, the extractor's identity, library versions, date.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sana_lab.config import atomic_write
from sana_lab.config.specs import SpecError
from sana_lab.evaluation import Extractor
from sana_lab.evaluation.distances.moments import Gaussian, Moments
from sana_lab.evaluation.extractors.resize import check
from sana_lab.types import Json

FORMAT = 1
LIBRARIES = ("torch", "torchvision", "transformers", "torch-fidelity")


class Reference(NamedTuple):
    """The real side of a comparison."""

    gaussian: Gaussian
    features: Tensor | None  # (n, D) float32
    record: Json


class FeatureSet:
    """Features of images that come in batches: moments in float64, a hash, and with `keep` the features themselves."""

    def __init__(self, keep: bool) -> None:
        self.keep, self.moments = keep, Moments()
        self._features: list[Tensor] = []
        self._digests: list[bytes] = []

    def add(self, images: Tensor, features: Tensor) -> None:
        """Add images (B, 3, H, W) with their features (B, D). ValueError for features that are not finite."""
        self.add_features(digests(images), features)

    def add_features(self, hashes: Sequence[bytes], features: Tensor) -> None:
        """Add the hashes of images, by `digests`, with their features (B, D)."""
        features = features.cpu()
        if len(bad := (~features.isfinite().all(1)).nonzero()):
            at = self.n + int(bad[0])
            raise ValueError(f"the features of image {at} (from 0) are not finite; {len(bad)} of this batch are not")
        self.moments.add(features)
        self._digests += hashes
        if self.keep:
            self._features.append(features.float())

    @property
    def n(self) -> int:
        return len(self._digests)

    @property
    def features(self) -> Tensor:
        """(n, D) float32, if kept."""
        if len(self._features) > 1:
            self._features = [torch.cat(self._features)]
        return self._features[0]

    def sha256(self) -> str:
        """SHA-256 of the sorted hashes of all images, independent of their order."""
        return hashlib.sha256(b"".join(sorted(self._digests))).hexdigest()

    def reference(self, identity: Json) -> Reference:
        """Statistics of the images so far. ValueError below two images."""
        if self.n < 2:
            raise ValueError(f"a reference needs at least two images; given {self.n}")
        versions, date = {name: version(name) for name in LIBRARIES}, datetime.now(UTC).date().isoformat()
        origin = {"extractor": identity, "versions": versions, "date": date}
        record = {"format": FORMAT, "images_sha256": self.sha256(), "n": self.n, **origin}
        return Reference(self.moments.gaussian(), self.features if self.keep else None, record)


def compute(images: Iterable[Tensor], extractor: Extractor, *, features: bool = False, batch: int = 64) -> Reference:
    """Statistics of a stream of uint8 images (B, 3, H, W), each read once.

    `features` keeps the features too (4 D bytes per image), which KID, CMMD, precision and recall need.
    """
    real = FeatureSet(features)
    for group in images:
        check(group)
        for part in group.split(batch):
            real.add(part, extractor.features(part))
    return real.reference(extractor.identity())


def save(reference: Reference, path: Path) -> None:
    """Write the file atomically. DiskFull with the room that is left."""
    tensors = {"mean": reference.gaussian.mean, "covariance": reference.gaussian.covariance}
    if reference.features is not None:
        tensors["features"] = reference.features
    with atomic_write.replacing(path) as partial:
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial, {"record": json.dumps(reference.record)})


def load(path: Path, extractor: Extractor | None = None) -> Reference:
    """Read what `save` wrote. SpecError for another file or another extractor, naming what differs."""
    if not path.is_file():
        raise SpecError(f"there is no file of reference statistics {str(path)!r}; `sana-lab stats FOLDER` makes one")
    try:
        with safe_open(path, "pt") as file:
            record = json.loads((file.metadata() or {})["record"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        reference = Reference(Gaussian(tensors["mean"], tensors["covariance"]), tensors.get("features"), record)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise SpecError(f"{str(path)!r} is truncated or holds no reference statistics: {error!r}") from error
    if record.get("format") != FORMAT:
        raise SpecError(f"{str(path)!r} has format {record.get('format')!r}, expected {FORMAT}")
    if extractor is not None:
        _check_same(record["extractor"], extractor.identity(), path)
    return reference


def _check_same(actual: Json, expected: Json, path: Path) -> None:
    """SpecError with each key of the extractor's identity that differs."""
    keys = [key for key in {**actual, **expected} if actual.get(key) != expected.get(key)]
    if keys:
        differences = "; ".join(f"{key} is {actual.get(key)!r}, expected {expected.get(key)!r}" for key in keys)
        raise SpecError(f"the reference statistics {str(path)!r} are of another extractor: {differences}")


def digests(images: Tensor) -> list[bytes]:
    """A hash of the pixels of each image."""
    return [_digest(image) for image in images]


def _digest(image: Tensor) -> bytes:
    shape = repr(tuple(image.shape)).encode()
    return hashlib.sha256(shape + image.cpu().contiguous().numpy().tobytes()).digest()
