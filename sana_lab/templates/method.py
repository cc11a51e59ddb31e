"""A training method: a loss term of a block's hidden states, with a layer of its own that trains with the model."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sana_lab.methods import Method, Model, Step


class Frequencies(Method):
    """A linear map of a block's hidden states predicts the amplitudes of the latents' spatial frequencies."""

    def __init__(
        self,
        weight: float = 0.1,  # factor of the term in the loss
        block: int | None = None,  # block that is read, from 0; null is half of the depth
    ) -> None:
        super().__init__()
        self.weight, self.block = weight, block

    def build(self, model: Model) -> None:
        """Create the layer; a block that the DiT does not have is refused."""
        self.blocks = [model.block(self.block, 1 / 2, self.name)]
        self.head = nn.Linear(model.width, model.dit.channels)

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        """Mean squared error of the amplitudes, mean over frequencies."""
        (tokens,) = (step.hidden[block] for block in self.blocks)  # (B, h, w, width)
        predicted = self.head(tokens.mean((1, 2)))
        amplitudes = torch.fft.rfft2(step.latents.float()).abs().mean((2, 3))  # (B, channels)
        return {self.name: (predicted - amplitudes).square().mean()}
