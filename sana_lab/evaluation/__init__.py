"""Interfaces of evaluation: a measure takes images in batches and reports numbers with intervals.

Both kinds are parts: a suite in `eval/` names them, and a user's own `module:Class` works like a shipped one.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from torch import Tensor

from sana_lab.config.specs import SpecError
from sana_lab.evaluation import distributed
from sana_lab.intervals import Estimate
from sana_lab.types import Json

Resize = Literal["clean", "tf1", "torch", "none"]
"""Resize to an extractor's input size: antialiased bicubic as Pillow's, TensorFlow 1's bilinear, torch's bilinear."""


class Report(NamedTuple):
    """Result of one measure."""

    values: dict[str, Estimate]  # column of a table -> number with its 95 % interval
    settings: Json  # plain data that must be equal for two values to be comparable
    # column -> one number per image, in order, whose mean is the value: outcomes, or influences of a distance
    per_image: Mapping[str, list[float]] = MappingProxyType({})


class Measure(ABC):
    """Numbers about generated images.

    Calls: `refer` with every batch of real images (if `needs_reference`), `add` with every batch of generated ones,
    then `report`. Each image comes once. A subclass implements `add` and `report`, and overrides the attributes and
    methods below where their defaults are not right.

    Several processes that evaluate together call `extract` with their own images and `collect` with the results of all,
    in order. By default that sends the images; a measure with a network overrides both, so that each process runs it on
    its share, and `add` is `collect` of `extract`.
    """

    rows: Sequence[Json] | None = None
    """The measure's prompts, {"prompt": ..., ...} each; None for the captions of held-out data."""
    images_per_prompt: int = 1
    """Number of images to generate per row."""
    needs_reference: bool = False
    """Whether it compares with real images."""
    own_prompts: bool | None = None
    """Whether `rows` will be the measure's own prompts; None if that is not known before it is built."""
    scores_images: bool | None = None
    """Whether `score_images` gives scores; None if that is not known before it runs."""
    needs_captions: bool = True
    """Whether it scores images against the prompts of their rows, which must then have one."""

    def refer(self, images: Tensor) -> None:
        """Add real images (B, 3, H, W) uint8 to compare with."""
        raise NotImplementedError(f"{type(self).__name__} compares with no reference")

    @abstractmethod
    def add(self, images: Tensor, rows: Sequence[Json]) -> None:
        """Add images (B, 3, H, W) uint8, image i generated for row i."""

    def extract(self, images: Tensor, rows: Sequence[Json]) -> Any:
        """What `collect` needs of images (B, 3, H, W) uint8 of these rows: plain data and tensors on the CPU."""
        return images.cpu() if distributed.size() > 1 else images

    def collect(self, extracted: Any, rows: Sequence[Json]) -> None:
        """Add what a process has extracted from images of these rows."""
        self.add(extracted, rows)

    def extract_reference(self, images: Tensor) -> Any:
        """What `collect_reference` needs of real images (B, 3, H, W) uint8."""
        return images

    def collect_reference(self, extracted: Any) -> None:
        """Refer to what a process has extracted from real images."""
        self.refer(extracted)

    def score_images(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
        """A score of each image (B, 3, H, W) uint8 for its prompt, of which more is better, for `sampling.best_by`; by
        default what `extract` gives. SpecError for a measure that scores no single images."""
        extracted = self.extract(images, [{"prompt": prompt} for prompt in prompts])
        if not isinstance(extracted, list) or not all(isinstance(x, int | float) for x in extracted):
            raise SpecError(
                f"best_by is {type(self).__name__}, which scores no single images; expected a measure that does, such "
                "as clip_shapes, exact_shapes, geneval, clip_score, image_reward or hps"
            )
        return [float(x) for x in extracted]

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """SpecError for prompts that `score_images` cannot judge; by default it judges all."""
        return

    @abstractmethod
    def report(self) -> Report:
        """The numbers of all images so far. ValueError for too few images."""

    def details(self) -> Json:
        """Entries to add to the whole report, such as outcomes per prompt; plain data."""
        return {}

    def check_rows(self, rows: Sequence[Json]) -> None:
        """Validate the rows of a folder's images before the first `add`. ValueError for rows that it cannot score."""
        return

    def add_folder(self, folder: Path) -> bool:
        """Add all images of a folder in a measure-specific layout. False if there is none, so that `add` is used."""
        return False


class Extractor(ABC):
    """Feature extractor: images (B, 3, H, W) uint8 of any size -> features (B, dim) float32."""

    dim: int
    """Number of features."""

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Features (B, dim), without gradient, on the extractor's device, independent of the rest of the batch."""

    def tokens(self, images: Tensor) -> Tensor:
        """Features (B, h, w, dim) of the cells of a grid, for representation alignment; by default one token, the
        features."""
        return self.features(images)[:, None, None]

    @abstractmethod
    def identity(self) -> Json:
        """Everything the features depend on: extractor, layer, sha256 of weights, resize, dtype."""
