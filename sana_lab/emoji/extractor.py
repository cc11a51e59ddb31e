"""Features of `emoji_features`; their Fréchet distance is the column `fd_emoji`."""

from typing import Annotated, final

import torch
from torch import Tensor

from sana_lab.checkpoints.networks import trained
from sana_lab.config.specs import RUNTIME
from sana_lab.emoji.networks import SIDE, Features, features_of
from sana_lab.environment import place
from sana_lab.evaluation import Extractor
from sana_lab.evaluation.extractors.resize import resize
from sana_lab.types import Json


@final
class EmojiExtractor(Extractor):
    """Features of `networks.Features`, of length 1, valid only for emoji. SpecError for weights of another network."""

    def __init__(
        self,
        weights: str = "experiment:emoji_features",  # experiment:NAME or the weights file of such an experiment
        device: Annotated[str, RUNTIME] = "auto",  # auto, cpu, cuda, cuda:1 ...
    ) -> None:
        self.device = place(device)
        network, self.weights_sha256 = trained(weights, Features)
        self.network = network.to(self.device)
        self.dim = network.dim

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        return features_of(self.network, resize(images.to(self.device), SIDE, "clean"))

    def identity(self) -> Json:
        return {
            "extractor": "emoji",
            "weights_sha256": self.weights_sha256,
            "layer": "head, length 1",
            "resize": "clean",
            "side": SIDE,
            "dtype": "float32",
        }
