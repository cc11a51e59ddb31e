"""Weight on the front channels of structured latents in the diffusion loss (DC-AE 1.5, arXiv 2508.00413)."""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from sana_lab.config.ranges import Nonnegative, Width
from sana_lab.config.specs import SpecError
from sana_lab.methods import Method, Model, Step
from sana_lab.models.autoencoders.latent_structure import front_counts, front_mask
from sana_lab.ops.transfer import to_device


@final
class FrontChannels(Method):
    """The squared error of a random number of front channels, a mean over these, beside that of all channels."""

    def __init__(
        self,
        weight: Nonnegative = 1.0,  # factor of the term in the loss
        # The number is a multiple of this, as `front_channels` of the autoencoder; null is a quarter of the channels.
        step: Width | None = None,
    ) -> None:
        super().__init__()
        self.weight, self.step = weight, step

    def build(self, model: Model) -> None:
        channels = model.dit.channels
        if self.step is not None and self.step > channels:
            raise SpecError(
                f"method {self.name!r} has step {self.step}, and the latents have {channels} channels; expected fewer"
            )
        self.counts = torch.tensor(front_counts(channels, self.step or max(1, channels // 4)), device="cpu")

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        errors = (step.prediction - step.target).float().square()
        chosen = self.counts[(step.uniform(1)[:, 0] * len(self.counts)).long()]
        chosen = to_device(chosen, errors.device)
        kept = (errors * front_mask(chosen, errors.shape[1])).mean((2, 3)).sum(1) / chosen
        return {self.name: kept.mean()}
