"""Small pictures of an evaluation: the first image of each prompt, for reports of outcomes."""

import base64
import io
from collections.abc import Sequence

from torch import Tensor

from sana_lab.evaluation import distributed
from sana_lab.evaluation.run_measures import Source

SIZE, MOST = 96, 500
"""Pixels of the longer side at most, and prompts with a picture: about two kilobytes each."""


class Thumbnails:
    """Take the first image of each prompt while a source generates for measures; `images` holds them."""

    def __init__(self) -> None:
        self.images: dict[str, str] = {}  # prompt -> WebP as base64
        self.indices: dict[str, int] = {}  # prompt -> noise index of that image

    def of(self, source: Source) -> Source:
        """The same source, whose images of the first seed of noise are taken on their way."""

        def generate(prompts: Sequence[str], indices: Sequence[int]) -> Tensor:
            images = source.generate(list(prompts), list(indices))
            for prompt, image, index in zip(prompts, images, indices, strict=True):
                self.take(prompt, image, index)
            return images

        return source._replace(generate=generate)

    def gather(self) -> None:
        """Take those of all processes of a distributed evaluation."""
        for images, indices in distributed.gather((self.images, self.indices)):
            for prompt, index in indices.items():
                if index < self.indices.get(prompt, index + 1):
                    self.images[prompt], self.indices[prompt] = images[prompt], index

    def take(self, prompt: str, image: Tensor, index: int = 0) -> None:
        """Store (3, H, W) uint8, of a noise index, as the picture of a prompt that has none."""
        if prompt in self.images or len(self.images) >= MOST:
            return
        from torchvision.transforms.functional import to_pil_image

        picture, buffer = to_pil_image(image.cpu()), io.BytesIO()
        picture.thumbnail((SIZE, SIZE))
        picture.save(buffer, "WEBP", quality=80)
        self.indices[prompt] = index
        self.images[prompt] = base64.b64encode(buffer.getvalue()).decode()
