"""The Inception that FID and the Inception Score are defined by, in torch-fidelity's port; weights by path."""

import pickle
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_lab.config.digests import sha256
from sana_lab.config.specs import RUNTIME
from sana_lab.environment import place
from sana_lab.evaluation import Extractor, Resize
from sana_lab.evaluation.extractors.resize import resize
from sana_lab.types import Json

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
SIDE = 299

Layer = Literal["64", "192", "768", "2048"]

STAGES: dict[Layer, tuple[str, ...]] = {
    "64": ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1"),
    "192": ("Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2"),
    "768": tuple(f"Mixed_{name}" for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e")),
    "2048": tuple(f"Mixed_{name}" for name in ("7a", "7b", "7c")),
}
"""Where features may be taken, by their width, and the port's modules up to there."""


class Seen(NamedTuple):
    """What one pass gives."""

    features: Tensor  # (B, D)
    logits: Tensor  # (B, 1008), without the bias, as the Inception Score takes them


@final
class Inception(Extractor):
    """Means over the picture of a layer's activations; FID's own layer is 2048, its own resize `tf1`.

    `weights` is torch-fidelity's file. FileNotFoundError without it; ValueError where it is none, or another network's.
    """

    def __init__(
        self,
        weights: str | None = None,
        layer: Layer = "2048",
        resize: Resize = "tf1",
        device: Annotated[str, RUNTIME] = "auto",
    ) -> None:
        self.layer: Layer = layer
        self.resize: Resize = resize
        self.dim, self.device = int(layer), place(device)
        self.network = _load(weights).to(self.device)
        self.weights_sha256 = sha256(Path(weights or ""))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        x = self._pixels(images)
        for layer in STAGES:
            x = self._stage(x, layer)
            if layer == self.layer:
                break
        return _pooled(x)

    @torch.no_grad()
    def features_and_logits(self, images: Tensor) -> Seen:
        """Both in one pass."""
        x, found = self._pixels(images), {}
        for layer in STAGES:
            x = self._stage(x, layer)
            found[layer] = _pooled(x)
        return Seen(found[self.layer], F.linear(found["2048"], self.network.get_parameter("fc.weight")))

    def identity(self) -> Json:
        return {
            "extractor": "inception",
            "weights_sha256": self.weights_sha256,
            "layer": self.layer,
            "resize": self.resize,
            "side": SIDE,
            "dtype": "float32",
        }

    def _pixels(self, images: Tensor) -> Tensor:
        return (resize(images.to(self.device), SIDE, self.resize) - 128) / 128

    def _stage(self, x: Tensor, layer: Layer) -> Tensor:
        for name in STAGES[layer]:
            x = self.network.get_submodule(name)(x)
        return x


def hint() -> str:
    """How to get the weights, in one line."""
    return f"for FID download {WEIGHTS} from github.com/toshas/torch-fidelity/releases (v0.2.0) and give its path"


def _pooled(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


def _load(weights: str | None) -> torch.nn.Module:
    _check(weights)
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        return FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=weights)
    except RuntimeError as error:
        raise ValueError(f"{weights!r} holds another network than this Inception; {hint()}") from error


def _check(weights: str | None) -> None:
    """A file of tensors and nothing else: torch-fidelity itself would run code that a file holds."""
    if weights is None or not Path(weights).is_file():
        given = "Inception needs its weights" if weights is None else f"there is no Inception at {weights!r}"
        raise FileNotFoundError(f"{given}; {hint()}; kernel and Fréchet distances work with any other extractor")
    try:
        torch.load(weights, map_location="meta", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{weights!r} is no file of weights; {hint()}") from error
