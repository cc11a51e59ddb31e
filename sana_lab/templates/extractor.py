"""An extractor: images to features, for distances between sets of images."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_lab.evaluation import Extractor
from sana_lab.types import Json


class Thumbnails(Extractor):
    """The pixels of the image at a small size."""

    def __init__(
        self,
        size: int = 8,  # pixels a side of the thumbnail
    ) -> None:
        self.size, self.dim = size, 3 * size * size

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, dim) float32."""
        return F.adaptive_avg_pool2d(images.float() / 255, self.size).flatten(1)

    def identity(self) -> Json:
        """Everything that the features depend on."""
        return {"extractor": "thumbnails", "size": self.size}
