"""What colour an object has, by zero-shot CLIP on its masked crop: GenEval's rule."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sana_lab.evaluation.clip_model import PretrainedClip
from sana_lab.shapes.scenes import COLORS
from sana_lab.types import Json, Object

TEMPLATES = ("a photo of a {color} {label}", "a photo of a {color}-colored {label}", "a photo of a {color} object")
GROUND = 0x99  # of all three channels, outside of the mask


class ColorNamer:
    """Names the one of ten colours whose texts are nearest to an object's crop; GenEval takes OpenAI's ViT-L/14."""

    def __init__(self, folder: str, device: str = "auto") -> None:
        self.clip = PretrainedClip(folder, device)
        self.classifiers: dict[str, Tensor] = {}  # label -> (10, D)

    def name(self, image: Tensor, things: Sequence[Object]) -> list[Object]:
        """The objects of one uint8 (3, H, W) image, each with its colour."""
        if not things:
            return []
        pictures = self.clip.pictures([crop(image, thing) for thing in things])
        near = [self._classifier(thing.label) @ row for thing, row in zip(things, pictures, strict=True)]
        return [thing._replace(color=COLORS[int(n.argmax())]) for thing, n in zip(things, near, strict=True)]

    def identity(self) -> Json:
        return {"rule": "CLIP zero-shot on the crop, #999 outside of the mask", **self.clip.identity()}

    def _classifier(self, label: str) -> Tensor:
        """(10, D) for each colour the direction of the mean over the templates."""
        if label not in self.classifiers:
            texts = [t.format(color=color, label=label) for color in COLORS for t in TEMPLATES]
            directions = self.clip.texts(texts).unflatten(0, (len(COLORS), len(TEMPLATES)))
            self.classifiers[label] = normalize(directions.mean(1), dim=-1)
        return self.classifiers[label]


def crop(image: Tensor, thing: Object) -> Tensor:
    """The object's box, to whole pixels, with the ground where its mask is not. Never empty."""
    height, width = image.shape[1:]
    if thing.mask is not None:
        image = torch.where(thing.mask.to(image.device), image, torch.full_like(image, GROUND))
    x0, y0, x1, y1 = map(round, thing.box)
    left, top = min(max(x0, 0), width - 1), min(max(y0, 0), height - 1)
    return image[:, top : max(min(y1, height), top + 1), left : max(min(x1, width), left + 1)]
