"""Pruners: which trainings of a search end early, by what they and others had at the same steps."""

from abc import ABC, abstractmethod
from collections.abc import Sequence


class Pruner(ABC):
    """Compares trainings at rungs, steps that all of them pass."""

    on: str | None
    """The metric that is compared: val_loss at validations, another at points of curves; None is that of the search."""

    @abstractmethod
    def rungs(self, first: int, last: int) -> list[int]:
        """The steps of the rungs below `last`, the end of a training; `first` is where its metric is first known."""

    @abstractmethod
    def stops(self, value: float, others: Sequence[float]) -> bool:
        """Whether a training ends at a rung with a value, where `others` had theirs there so far; lower is better."""

    @abstractmethod
    def describe(self) -> str:
        """How it prunes, in words for the dry run."""
