"""Interface of GenEval's object detectors."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sana_lab.types import Json, Object


class Detector(ABC):
    """Object detector for single images. The score above which an object counts depends on the row."""

    labels: Sequence[str]  # all classes that it can name
    title: str  # in tables: "GenEval (title)"
    names_colors: bool = False  # whether `detect` fills in `Object.color`; otherwise a CLIP does
    threshold: float = 0.0  # an object's score must be above it
    counting_threshold: float = 0.0  # the same for rows of the task `counting`

    @abstractmethod
    def detect(self, image: Tensor | Any) -> list[Object]:
        """Objects in one uint8 (3, H, W) image; those certainly below both thresholds may be omitted."""

    @abstractmethod
    def identity(self) -> Json:
        """Everything the objects depend on: name, sha256 of weights, input size, rule."""

    def prompts(self, per_task: int, seed: int) -> list[Json] | None:
        """Rows in this detector's own vocabulary, fewer of a task only where no more exist; None for GenEval's 553."""
        return None

    def threshold_for(self, row: Json) -> float:
        """The score that an object must exceed in an image of this row."""
        return self.counting_threshold if row["tag"] == "counting" else self.threshold
