"""Features of the embedded world's attribute network; their Fréchet distance is the column `fd_shapes`."""

from typing import Annotated, final

import torch
from torch import Tensor

from sana_lab.checkpoints.networks import trained
from sana_lab.config.specs import RUNTIME
from sana_lab.environment import place
from sana_lab.evaluation import Extractor
from sana_lab.evaluation.extractors.resize import resize
from sana_lab.shapes.networks import SIDE, Attributes, as_input
from sana_lab.types import Json


@final
class Shapes(Extractor):
    """Features of `networks.Attributes`, from which object counts are a linear map: contents without positions.

    SpecError for weights of another network.
    """

    def __init__(
        self,
        weights: str = "experiment:shapes_attributes",  # experiment:NAME or the weights file of such an experiment
        device: Annotated[str, RUNTIME] = "auto",  # auto, cpu, cuda, cuda:1 ...
    ) -> None:
        self.device = place(device)
        network, self.weights_sha256 = trained(weights, Attributes)
        self.network = network.to(self.device)
        self.dim = network.dim

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        return self.network.features(as_input(resize(images.to(self.device), SIDE, "clean")))

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """The last stage's cells (B, h, w, dim), whose mean are the features."""
        return self.network.body(as_input(resize(images.to(self.device), SIDE, "clean"))).movedim(1, -1)

    def identity(self) -> Json:
        return {
            "extractor": "shapes",
            "weights_sha256": self.weights_sha256,
            "layer": "mean of the last stage",
            "resize": "clean",
            "side": SIDE,
            "dtype": "float32",
        }
