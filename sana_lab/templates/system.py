"""A system: networks that are trained together, and their loss."""

from typing import Annotated

import torch.nn.functional as F
from torch import Tensor, nn

from sana_lab.checkpoints.build import build
from sana_lab.config.specs import Spec
from sana_lab.systems import System
from sana_lab.systems.ema import Average
from sana_lab.types import Batch

TEXT = {"name": "t5", "width": 32, "layers": 1, "heads": 2, "max_tokens": 24}


class Palette(System):
    """Predicts the mean colour of an image from its caption."""

    def __init__(
        self,
        text_encoder: Annotated[Spec, "text_encoder"] = TEXT,  # reads the caption
        optimizer: Annotated[Spec, "optimizer"] = "adamw",  # of all weights
        warmup: int = 10,  # steps until the learning rate is full
        ema: float = 0.99,  # decay of the averaged weights
    ) -> None:
        super().__init__()
        self.text_encoder = build("text_encoder", text_encoder)
        self.head = nn.Linear(self.text_encoder.dim, 3)
        self.average = Average(self, ema)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        assert batch.images is not None  # it trains on pixels, not on cached latents
        text = self.text_encoder(batch.prompts)
        features = (text.tokens * text.mask[..., None]).sum(1) / text.mask.sum(1, keepdim=True)
        loss = F.mse_loss(self.head(features), batch.images.mean((2, 3)))
        self.log("train/loss", loss.detach())
        return loss
