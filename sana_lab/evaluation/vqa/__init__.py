"""Yes or no about a picture: the interface of the models that answer DPG-Bench's questions."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from sana_lab.types import Json


class Vqa(ABC):
    """Answers questions about one picture."""

    @abstractmethod
    def answer(self, image: Tensor, questions: Sequence[str]) -> list[bool]:
        """Whether the answer to each question is yes, for one uint8 (3, H, W) image."""

    @abstractmethod
    def identity(self) -> Json:
        """What the answers depend on: name, sha256 of weights, rule."""
