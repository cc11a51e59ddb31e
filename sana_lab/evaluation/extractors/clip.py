"""CLIP's image tower (arXiv 2103.00020) from a transformers folder; CMMD's is ViT-L/14 at 336 pixels (2401.09603)."""

import math
from pathlib import Path
from typing import Annotated, Any, final

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel, CLIPVisionModelWithProjection

from sana_lab.checkpoints import files
from sana_lab.config.specs import RUNTIME, SpecError
from sana_lab.environment import place
from sana_lab.evaluation import Extractor, Resize, transformers_models
from sana_lab.evaluation.extractors import standardise
from sana_lab.evaluation.extractors.resize import resize
from sana_lab.models.text.loading import read_config
from sana_lab.types import Json

TOWER = "clip_vision_model"


@final
class Clip(Extractor):
    """Projected image features. The whole image is scaled, as CMMD does, where CLIP's own processor crops the centre.

    Input size, mean and deviation of colours are the folder's. SpecError for a folder of another model.
    """

    def __init__(
        self,
        model: str,  # transformers folder of a whole CLIP or of its image tower
        resize: Resize = "clean",  # to the network's input size: clean (antialiased bicubic), tf1, torch or none
        normalize: bool = False,  # scale features to length 1
        device: Annotated[str, RUNTIME] = "auto",  # auto, cpu, cuda, cuda:1 ...
    ) -> None:
        self.resize: Resize = resize
        self.normalize, self.device = normalize, place(device)
        self.network = _tower(model).to(self.device)
        self.mean, self.std = _statistics(Path(model).expanduser())
        self.size = _vision(self.network.config).image_size
        self.dim = self.network.visual_projection.out_features
        self.weights_sha256 = transformers_models.weights_sha256(model)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        features = self.network.visual_projection(self._outputs(images).pooler_output)
        return F.normalize(features) if self.normalize else features

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """The tokens of patches (B, h, w, dim), with the norm and projection of the pooled one (MaskCLIP's)."""
        states = self._outputs(images).last_hidden_state[:, 1:]
        features = self.network.visual_projection(self.network.vision_model.post_layernorm(states))
        side = math.isqrt(features.shape[1])
        return (F.normalize(features, dim=-1) if self.normalize else features).unflatten(1, (side, side))

    def _outputs(self, images: Tensor) -> Any:
        pixels = standardise(resize(images.to(self.device), self.size, self.resize), self.mean, self.std)
        return self.network.vision_model(pixel_values=pixels)

    def identity(self) -> Json:
        return {
            "extractor": "clip",
            "weights_sha256": self.weights_sha256,
            "layer": "projection, length 1" if self.normalize else "projection",
            "resize": self.resize,
            "side": self.size,
            "dtype": "float32",
        }


def _tower(model: str) -> Any:
    if Path(model).expanduser().is_dir() and read_config(model).model_type == TOWER:
        return transformers_models.load(CLIPVisionModelWithProjection, model, TOWER)
    network = transformers_models.load(CLIPModel, model, "clip")
    del network.text_model, network.text_projection
    return network


def _vision(config: Any) -> Any:
    return getattr(config, "vision_config", config)


def _statistics(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of colours in the network's preprocessing."""
    config = _read(folder / "preprocessor_config.json") or _read(folder / "processor_config.json")
    config = config.get("image_processor", config)
    try:
        return tuple(config["image_mean"]), tuple(config["image_std"])
    except KeyError as error:
        raise SpecError(f"{folder} lacks a preprocessor_config.json with image_mean and image_std") from error


def _read(path: Path) -> Json:
    return files.read_json(path) if path.is_file() else {}
