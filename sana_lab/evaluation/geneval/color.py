"""Colour of a detected object by zero-shot CLIP on its masked crop, GenEval's rule."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sana_lab.evaluation.clip_model import PretrainedClip
from sana_lab.evaluation.geneval.vocabulary import COLORS
from sana_lab.types import Json, Object

TEMPLATES = ("a photo of a {color} {label}", "a photo of a {color}-colored {label}", "a photo of a {color} object")
GROUND = 0x99  # value of all three channels outside the mask


class ClipColors:
    """Zero-shot classifier of an object's crop into GenEval's ten colours; GenEval's CLIP is OpenAI's ViT-L/14."""

    def __init__(self, folder: str, device: str = "auto") -> None:
        self.clip = PretrainedClip(folder, device)
        self.classifiers: dict[str, Tensor] = {}  # label -> (10, D)

    def classify(self, image: Tensor, objects: Sequence[Object]) -> list[Object]:
        """The objects of one uint8 (3, H, W) image, each with its colour."""
        if not objects:
            return []
        features = self.clip.image_features([crop(image, thing) for thing in objects])
        cosines = [self._classifier(thing.label) @ row for thing, row in zip(objects, features, strict=True)]
        return [thing._replace(color=COLORS[int(c.argmax())]) for thing, c in zip(objects, cosines, strict=True)]

    def identity(self) -> Json:
        return {"rule": "CLIP zero-shot on the crop, #999 outside of the mask", **self.clip.identity()}

    def _classifier(self, label: str) -> Tensor:
        """(10, D): for each colour the normalised mean feature of the templates."""
        if label not in self.classifiers:
            texts = [t.format(color=color, label=label) for color in COLORS for t in TEMPLATES]
            features = self.clip.text_features(texts).unflatten(0, (len(COLORS), len(TEMPLATES)))
            self.classifiers[label] = normalize(features.mean(1), dim=-1)
        return self.classifiers[label]


def crop(image: Tensor, thing: Object) -> Tensor:
    """The object's box in whole pixels, at least one, with GROUND outside its mask: (3, h, w) uint8."""
    height, width = image.shape[1:]
    if thing.mask is not None:
        image = torch.where(thing.mask.to(image.device), image, torch.full_like(image, GROUND))
    x0, y0, x1, y1 = map(round, thing.box)
    left, top = min(max(x0, 0), width - 1), min(max(y0, 0), height - 1)
    return image[:, top : max(min(y1, height), top + 1), left : max(min(x1, width), left + 1)]
