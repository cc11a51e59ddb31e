"""What sees objects in pictures: the interface of GenEval's detectors."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sana_lab.types import Json, Object


class Detector(ABC):
    """Finds the objects of one picture. What counts as found is up to the row that is judged: `threshold_for`.

    A subclass gives `labels` (all that it can name) and `title` (how tables call what it judged), and says with
    `names_colors` whether it sees colours itself.
    """

    labels: Sequence[str]
    title: str
    names_colors: bool = False
    threshold: float = 0.0  # an object's score must be above it
    counting_threshold: float = 0.0  # the same for rows of the task `counting`

    @abstractmethod
    def detect(self, image: Tensor | Any) -> list[Object]:
        """The objects in one uint8 (3, H, W) image, those that are surely below every threshold left out."""

    @abstractmethod
    def identity(self) -> Json:
        """What the objects depend on: name, sha256 of weights, input size, rule."""

    def threshold_for(self, row: Json) -> float:
        """The score that an object must exceed in a picture of this row."""
        return self.counting_threshold if row["tag"] == "counting" else self.threshold
