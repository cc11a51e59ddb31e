"""Searches: the next trial of an ablation is proposed by the results of those before it.

A search has no state of its own: a proposal depends on its number, the seed and the trials so far, which the runs in
MLflow record. A search that was killed goes on as if it had not been.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from sana_lab.config.schema import Range

Values = dict[str, Any]
"""A point: axis -> label, and path of an option -> number."""

Space = Mapping[str, "Sequence[str] | Range"]
"""What points are of: axis -> its labels, and path of an option -> its range."""


class Observation(NamedTuple):
    """A trial so far, as a search sees it."""

    values: Values
    state: Literal["finished", "pruned", "running", "failed"]
    value: float | None = None  # the measure of a finished trial
    rungs: Mapping[int, float] = {}  # step -> what the pruner compared there


class Search(ABC):
    """Proposes points of a space. The options that every search has are attributes."""

    trials: int
    """Proposals, those included whose trials were pruned or failed."""

    measure: str
    """The metric that decides."""

    direction: Literal["higher", "lower"] | None
    """Which values of the measure are better; None is as its column says."""

    pruner: dict[str, Any] | None
    """Spec of what ends trainings early."""

    @abstractmethod
    def check(self) -> None:
        """Before any work: ImportError for a missing package with its extra."""

    @abstractmethod
    def propose(self, space: Space, history: Sequence[Observation], attempt: int, *, lower: bool) -> Values:
        """The point with the number len(history), where `lower` values are better, or higher ones.

        Running trials are in the history: points beside them are to differ. Where a point is refused, as it has a trial
        already or cannot be built, the next `attempt` (from 0) is to be another.
        """

    @abstractmethod
    def describe(self) -> str:
        """How it searches, in words for the dry run."""
