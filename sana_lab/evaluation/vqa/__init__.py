"""Interface of the visual question answering models that answer DPG-Bench's yes-or-no questions."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from sana_lab.types import Json


class Vqa(ABC):
    """Answers yes-or-no questions about one image."""

    @abstractmethod
    def answer(self, image: Tensor, questions: Sequence[str]) -> list[bool]:
        """Whether the answer to each question is yes, for one uint8 (3, H, W) image."""

    @abstractmethod
    def identity(self) -> Json:
        """Everything the answers depend on: name, sha256 of weights, rule."""
