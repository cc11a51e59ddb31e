"""Small pictures of an evaluation."""

import base64
import io

import torch
from PIL import Image

from sana_lab.evaluation.run_measures import Source
from sana_lab.evaluation.thumbnails import SIZE, Thumbnails


def test_the_first_image_of_each_prompt_is_taken_and_images_pass_unchanged():
    images = torch.stack([torch.full((3, 200, 100), 80 * i, dtype=torch.uint8) for i in range(3)])
    thumbnails = Thumbnails()
    source = thumbnails.of(Source(lambda prompts, indices: images))
    assert source.generate(["a", "a", "b"], [0, 1, 2]) is images
    assert list(thumbnails.images) == ["a", "b"]
    a, b = (Image.open(io.BytesIO(base64.b64decode(text))) for text in thumbnails.images.values())
    assert a.size == b.size == (SIZE // 2, SIZE)
    assert (a.getpixel((5, 5))[0] < 8, abs(b.getpixel((5, 5))[0] - 160) < 8) == (True, True)
