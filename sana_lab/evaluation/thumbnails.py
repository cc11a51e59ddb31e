"""Small pictures of an evaluation: the first image of each prompt, for reports of outcomes."""

import base64
import io
from collections.abc import Sequence

from torch import Tensor

from sana_lab.evaluation.run_measures import Source

SIZE, MOST = 96, 500
"""Pixels of the longer side at most, and prompts with a picture: about two kilobytes each."""


class Thumbnails:
    """Take the first image of each prompt while a source generates for measures; `images` holds them."""

    def __init__(self) -> None:
        self.images: dict[str, str] = {}  # prompt -> WebP as base64

    def of(self, source: Source) -> Source:
        """The same source, whose images of the first seed of noise are taken on their way."""

        def generate(prompts: Sequence[str], indices: Sequence[int]) -> Tensor:
            images = source.generate(list(prompts), list(indices))
            for prompt, image in zip(prompts, images, strict=True):
                self.take(prompt, image)
            return images

        return source._replace(generate=generate)

    def take(self, prompt: str, image: Tensor) -> None:
        """Store (3, H, W) uint8 as the picture of a prompt that has none."""
        if prompt in self.images or len(self.images) >= MOST:
            return
        from torchvision.transforms.functional import to_pil_image

        picture, buffer = to_pil_image(image.cpu()), io.BytesIO()
        picture.thumbnail((SIZE, SIZE))
        picture.save(buffer, "WEBP", quality=80)
        self.images[prompt] = base64.b64encode(buffer.getvalue()).decode()
