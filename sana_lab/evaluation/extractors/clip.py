"""CLIP's picture tower (arXiv 2103.00020) from a transformers folder; CMMD's is ViT-L/14 at 336 pixels (2401.09603)."""

import json
from pathlib import Path
from typing import Annotated, Any, final

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel, CLIPVisionModelWithProjection

from sana_lab.config.specs import RUNTIME, SpecError
from sana_lab.environment import place
from sana_lab.evaluation import Extractor, Resize, transformers_models
from sana_lab.evaluation.extractors import standardised
from sana_lab.evaluation.extractors.resize import resize
from sana_lab.models.text.loading import read_config
from sana_lab.types import Json

TOWER = "clip_vision_model"


@final
class Clip(Extractor):
    """Projected pictures, of length 1 with `normalize`; pixels a side, mean and deviation as the folder `model` says.

    The folder holds a whole CLIP or its picture tower. The whole picture is scaled, as CMMD does it, where CLIP's own
    processor cuts out the middle. SpecError for another folder.
    """

    def __init__(
        self,
        model: str,
        resize: Resize = "clean",
        normalize: bool = False,
        device: Annotated[str, RUNTIME] = "auto",
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
        pixels = standardised(resize(images.to(self.device), self.size, self.resize), self.mean, self.std)
        found = self.network.visual_projection(self.network.vision_model(pixel_values=pixels).pooler_output)
        return F.normalize(found) if self.normalize else found

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
    """Mean and deviation of the colours that the network was trained with."""
    found = _read(folder / "preprocessor_config.json") or _read(folder / "processor_config.json")
    found = found.get("image_processor", found)
    try:
        return tuple(found["image_mean"]), tuple(found["image_std"])
    except KeyError as error:
        raise SpecError(f"{folder} lacks a preprocessor_config.json with image_mean and image_std") from error


def _read(path: Path) -> Json:
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise SpecError(f"{path} is no JSON: {error}") from error
