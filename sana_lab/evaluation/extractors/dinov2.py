"""DINOv2 (arXiv 2304.07193) from a transformers folder; FD-DINOv2 (arXiv 2306.04675) takes its ViT-L/14."""

from typing import Annotated, final

import torch
from torch import Tensor
from transformers import Dinov2Model

from sana_lab.config.ranges import Pixels
from sana_lab.config.specs import RUNTIME
from sana_lab.environment import place
from sana_lab.evaluation import Extractor, Resize, transformers_models
from sana_lab.evaluation.extractors import standardise
from sana_lab.evaluation.extractors.resize import resize
from sana_lab.types import Json

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's statistics of red, green and blue in [0, 1]."""


@final
class Dinov2(Extractor):
    """The class token after the last norm. SpecError for a folder of another model."""

    def __init__(
        self,
        model: str,  # transformers folder of a DINOv2; FD-DINOv2 uses facebook/dinov2-large
        resize: Resize = "clean",  # to the network's input size: clean (antialiased bicubic), tf1, torch or none
        size: Pixels = 224,  # pixels a side of the network's input
        device: Annotated[str, RUNTIME] = "auto",  # auto, cpu, cuda, cuda:1 ...
    ) -> None:
        self.resize: Resize = resize
        self.size, self.device = size, place(device)
        self.network = transformers_models.load(Dinov2Model, model, "dinov2").to(self.device)
        self.dim = self.network.config.hidden_size
        self.weights_sha256 = transformers_models.weights_sha256(model)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        return self._states(images)[:, 0]

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """The tokens of patches after the last norm, (B, h, w, dim), a side of size / 14 (the network's patch)."""
        states, side = self._states(images), self.size // self.network.config.patch_size
        return states[:, -(side**2) :].unflatten(1, (side, side))

    def _states(self, images: Tensor) -> Tensor:
        """Class token, registers if the network has some, and patches (B, N, dim)."""
        pixels = standardise(resize(images.to(self.device), self.size, self.resize), MEAN, STD)
        return self.network(pixel_values=pixels).last_hidden_state

    def identity(self) -> Json:
        return {
            "extractor": "dinov2",
            "weights_sha256": self.weights_sha256,
            "layer": "class token",
            "resize": self.resize,
            "side": self.size,
            "dtype": "float32",
        }
