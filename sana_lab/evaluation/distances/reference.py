"""Reference statistics: what a distance needs of real images, in one file that says what they are of.

A safetensors file with `mean` (D,) and `covariance` (D, D) in float64, `features` (n, D) in float32 where they were
kept, and a JSON record in its metadata: sha256 over the images, n, the extractor's identity, library versions, date.
"""

import hashlib
import json
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

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


class Sample:
    """Images of one distribution as they come: moments in float64, a hash, and features where they are asked for."""

    def __init__(self, keep: bool) -> None:
        self.keep, self.moments = keep, Moments()
        self._kept: list[Tensor] = []
        self._digests: list[bytes] = []

    def add(self, images: Tensor, features: Tensor) -> None:
        """Take in images (B, 3, H, W) and what was made of them (B, D). ValueError for what is not finite."""
        features = features.cpu()
        if len(bad := (~features.isfinite().all(1)).nonzero()):
            at = self.n + int(bad[0])
            raise ValueError(f"the features of image {at} (from 0) are not finite; {len(bad)} of this batch are not")
        self.moments.add(features)
        self._digests += [_digest(image) for image in images]
        if self.keep:
            self._kept.append(features.float())

    @property
    def n(self) -> int:
        return len(self._digests)

    @property
    def features(self) -> Tensor:
        """(n, D)"""
        if len(self._kept) > 1:
            self._kept = [torch.cat(self._kept)]
        return self._kept[0]

    def sha256(self) -> str:
        """Over the images' own hashes, sorted: the same for another order, and not for another pixel."""
        return hashlib.sha256(b"".join(sorted(self._digests))).hexdigest()

    def reference(self, identity: Json) -> Reference:
        """As it is now. ValueError below two images."""
        if self.n < 2:
            raise ValueError(f"a reference needs at least two images; given {self.n}")
        made = {"versions": {name: version(name) for name in LIBRARIES}, "date": datetime.now(UTC).date().isoformat()}
        record = {"format": FORMAT, "images_sha256": self.sha256(), "n": self.n, "extractor": identity, **made}
        return Reference(self.moments.gaussian(), self.features if self.keep else None, record)


def make(images: Iterable[Tensor], extractor: Extractor, *, features: bool = False, batch: int = 64) -> Reference:
    """Statistics of a stream of uint8 images (B, 3, H, W), each read once.

    `features` keeps them too, in memory and in the file (4 D bytes an image), for kernel and neighbour measures.
    """
    sample = Sample(features)
    for group in images:
        check(group)
        for part in group.split(batch):
            sample.add(part, extractor.features(part))
    return sample.reference(extractor.identity())


def save(reference: Reference, path: Path) -> None:
    """Write the file, whole or not at all."""
    tensors = {"mean": reference.gaussian.mean, "covariance": reference.gaussian.covariance}
    if reference.features is not None:
        tensors["features"] = reference.features
    part = path.with_name(f".{path.name}.part")
    save_file({k: v.contiguous() for k, v in tensors.items()}, part, {"record": json.dumps(reference.record)})
    part.replace(path)


def load(path: Path, extractor: Extractor | None = None) -> Reference:
    """What `save` wrote. SpecError for another file, and where it is of another extractor, naming what differs."""
    if not path.is_file():
        raise SpecError(f"there is no file of reference statistics {str(path)!r}; `sana-lab stats FOLDER` makes one")
    try:
        with safe_open(path, "pt") as file:
            record = json.loads((file.metadata() or {})["record"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        reference = Reference(Gaussian(tensors["mean"], tensors["covariance"]), tensors.get("features"), record)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise SpecError(f"{str(path)!r} is cut short or holds no reference statistics of ours: {error!r}") from error
    if record.get("format") != FORMAT:
        raise SpecError(f"{str(path)!r} has format {record.get('format')!r}, expected {FORMAT}")
    if extractor is not None:
        _check_same(record["extractor"], extractor.identity(), path)
    return reference


def _check_same(given: Json, expected: Json, path: Path) -> None:
    """SpecError with each key of the extractor's identity that differs, as the file says it and as it should be."""
    keys = [key for key in {**given, **expected} if given.get(key) != expected.get(key)]
    if keys:
        told = "; ".join(f"{key} is {given.get(key)!r}, expected {expected.get(key)!r}" for key in keys)
        raise SpecError(f"the reference statistics {str(path)!r} are of another extractor: {told}")


def _digest(image: Tensor) -> bytes:
    shape = repr(tuple(image.shape)).encode()
    return hashlib.sha256(shape + image.cpu().contiguous().numpy().tobytes()).digest()
