"""Dispersive loss (arXiv 2506.09027): hidden states of the samples of a batch away from each other, without pairs."""

import math
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from sana_lab.config.ranges import Nonnegative, Number, Positive
from sana_lab.config.specs import SpecError
from sana_lab.methods import Method, Model, Step


@final
class Dispersive(Method):
    """log mean exp(-d / tau) over all pairs (a sample with itself included) of squared distances d per dimension."""

    divisible = False

    def __init__(
        self,
        weight: Nonnegative = 0.5,  # lambda, factor of the term in the loss
        block: Number | None = None,  # block whose output is dispersed, from 0; null is a quarter of the depth
        tau: Positive = 0.5,  # temperature
    ) -> None:
        super().__init__()
        self.weight, self.block, self.tau = weight, block, tau

    def build(self, model: Model) -> None:
        self.index = model.block(self.block, 1 / 4, self.name)
        self.blocks = (self.index,)
        if model.batch == 1:
            raise SpecError(f"method {self.name!r} needs another sample, and data.batch is 1; expected at least 2")

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        return {self.name: dispersion(step.hidden[self.index].flatten(1).float(), self.tau)}


def dispersion(z: Tensor, tau: float) -> Tensor:
    """The loss of features (B, D)."""
    squares = z.square().sum(1)
    distances = (squares[:, None] + squares - 2 * z @ z.mT).clamp(min=0) / z.shape[1]
    return torch.logsumexp(-distances.flatten() / tau, 0) - 2 * math.log(len(z))
