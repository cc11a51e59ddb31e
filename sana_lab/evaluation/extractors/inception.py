"""The Inception network of FID and the Inception Score, in torch-fidelity's port; weights from a local file."""

import pickle
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_lab.config import digests
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
"""Layers of features, by their width -> the port's modules up to there."""


class Outputs(NamedTuple):
    """Outputs of one forward pass."""

    features: Tensor  # (B, D)
    logits: Tensor  # (B, 1008) without the bias, as the Inception Score uses them


@final
class Inception(Extractor):
    """Spatial means of a layer's activations. FID is defined by layer 2048 and resize `tf1`.

    FileNotFoundError without weights; ValueError for a file of something else.
    """

    def __init__(
        self,
        weights: str | None = None,  # path of torch-fidelity's weights-inception-2015-12-05-6726825d.pth; required
        layer: Layer = "2048",  # number of features of the layer
        resize: Resize = "tf1",  # to 299 x 299: tf1 (as FID is defined), clean (antialiased bicubic), torch or none
        device: Annotated[str, RUNTIME] = "auto",  # auto, cpu, cuda, cuda:1 ...
    ) -> None:
        self.layer: Layer = layer
        self.resize: Resize = resize
        self.dim, self.device = int(layer), place(device)
        self.network = _load(weights).to(self.device)
        self.weights_sha256 = digests.sha256(Path(weights or ""))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        return _pooled(self._activations(images))

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """The layer's activations (B, h, w, dim); 8 x 8 of layer 2048."""
        return self._activations(images).movedim(1, -1)

    def _activations(self, images: Tensor) -> Tensor:
        x = self._pixels(images)
        for layer in STAGES:
            x = self._stage(x, layer)
            if layer == self.layer:
                break
        return x

    @torch.no_grad()
    def features_and_logits(self, images: Tensor) -> Outputs:
        """Features and class logits in one pass."""
        x, pooled = self._pixels(images), {}
        for layer in STAGES:
            x = self._stage(x, layer)
            pooled[layer] = _pooled(x)
        return Outputs(pooled[self.layer], F.linear(pooled["2048"], self.network.get_parameter("fc.weight")))

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
    """One line on obtaining the weights."""
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
    """Check that the file holds tensors only: torch-fidelity itself would run code in a pickle."""
    if weights is None or not Path(weights).is_file():
        problem = "Inception needs its weights" if weights is None else f"there is no Inception at {weights!r}"
        raise FileNotFoundError(f"{problem}; {hint()}; kernel and Fréchet distances work with any other extractor")
    try:
        torch.load(weights, map_location="meta", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{weights!r} is no file of weights; {hint()}") from error
