"""Velocity direction supervision (FasterDiT, arXiv 2410.10356): the cosine of prediction and target."""

from collections.abc import Mapping
from typing import final

from torch import Tensor
from torch.nn import functional as F

from sana_lab.config.ranges import Nonnegative
from sana_lab.methods import Method, Step


@final
class Direction(Method):
    """One minus the cosine over channels of predicted and true velocity, mean over the latent grid."""

    def __init__(
        self,
        weight: Nonnegative = 1.0,  # factor of the term in the loss
    ) -> None:
        super().__init__()
        self.weight = weight

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        return {self.name: 1 - F.cosine_similarity(step.prediction.float(), step.target.float(), dim=1).mean()}
