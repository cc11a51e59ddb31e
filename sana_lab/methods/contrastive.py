"""Contrastive flow matching (arXiv 2506.05350): predictions away from the targets of other samples."""

from collections.abc import Mapping
from typing import final

from torch import Tensor

from sana_lab.config.ranges import Nonnegative
from sana_lab.config.specs import SpecError
from sana_lab.methods import Method, Model, Step


@final
class Contrastive(Method):
    """Minus the mean squared error of the prediction against the target of another sample of the batch."""

    divisible = False

    def __init__(
        self,
        weight: Nonnegative = 0.05,  # lambda, factor of the term in the loss; below 1, or nothing bounds the loss
    ) -> None:
        super().__init__()
        self.weight = weight

    def build(self, model: Model) -> None:
        if self.weight >= 1:
            raise SpecError(
                f"method {self.name!r} has weight {self.weight}, with which the loss has no minimum; expected < 1"
            )
        if model.batch == 1:
            raise SpecError(f"method {self.name!r} needs another sample, and data.batch is 1; expected at least 2")

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        """The other sample is the item before in the batch, whose order is random."""
        other = step.target.roll(step.draws, 0)
        return {self.name: -(step.prediction - other).float().square().mean()}
