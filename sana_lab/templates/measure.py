"""A measure of generated images: numbers with intervals."""

from collections.abc import Sequence

from torch import Tensor

from sana_lab.evaluation import Measure, Report
from sana_lab.intervals import bootstrap_mean
from sana_lab.types import Json


class Brightness(Measure):
    """Mean pixel value, 0 to 255."""

    needs_captions = False  # reads no prompts, so pictures without a caption will do

    def __init__(self) -> None:
        self.values: list[float] = []

    def add(self, images: Tensor, rows: Sequence[Json]) -> None:
        """Images (B, 3, H, W) uint8, image i generated for row i."""
        self.values += images.float().mean((1, 2, 3)).tolist()

    def report(self) -> Report:
        """Numbers by column, settings that must agree for two values to be comparable, numbers per image."""
        if not self.values:
            raise ValueError("no images came, so there is no brightness")
        return Report({"brightness": bootstrap_mean(self.values)}, {}, {"brightness": self.values})
