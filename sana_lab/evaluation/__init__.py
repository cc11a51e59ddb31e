"""Measures: what a model draws, and what drawing costs.

A measure takes images once, in batches, and reports numbers with intervals. An extractor turns images into features.
Both are parts: a suite in `eval/` names them, and a user's own serve as well.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple

from torch import Tensor

from sana_lab.types import Json

Resize = Literal["clean", "tf1", "torch", "none"]
"""How images become an extractor's size: antialiased bicubic as Pillow's; TensorFlow 1's bilinear; torch's bilinear."""


class Value(NamedTuple):
    """A number with its 95 % interval, where one is known."""

    value: float
    low: float | None
    high: float | None
    n: int  # images or prompts, whichever was resampled


class Report(NamedTuple):
    """What a measure found.

    `settings` says all that two numbers must share to be compared. `per_image` holds, for a column, one number for each
    image in order, whose mean is the value and whose spread is its uncertainty: outcomes, or a distance's influences.
    """

    values: dict[str, Value]
    settings: Json
    per_image: Mapping[str, list[float]] = MappingProxyType({})


class Measure(ABC):
    """Numbers about images, which come once, in batches: `refer` (if `needs_reference`) and `add`, then `report`."""

    rows: Sequence[Json] | None = None
    """Prompts of its own, {"prompt": ..., ...} each; None where the captions of held-out data serve."""
    images_per_prompt: int = 1
    needs_reference: bool = False

    def refer(self, images: Tensor) -> None:
        """Take in real images (B, 3, H, W) uint8 to compare with."""
        raise NotImplementedError(f"{type(self).__name__} compares with no reference")

    @abstractmethod
    def add(self, images: Tensor, rows: Sequence[Json]) -> None:
        """Take in images (B, 3, H, W) uint8, image i drawn for row i."""

    @abstractmethod
    def report(self) -> Report:
        """The numbers. ValueError where too few images came."""


class Extractor(ABC):
    """Images (B, 3, H, W) uint8 of any size -> features (B, dim) float32."""

    dim: int

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Without gradient, on the extractor's device; the same numbers for a picture whatever it is batched with."""

    @abstractmethod
    def identity(self) -> Json:
        """What the features depend on: extractor, layer, sha256 of its weights, resize, dtype."""
