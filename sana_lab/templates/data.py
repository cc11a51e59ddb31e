"""A data set: images or latents with captions, and a digest of their content."""

from collections.abc import Sequence

import torch

from sana_lab.data import DataModule, Split, Turn
from sana_lab.types import Batch


class Stripes(DataModule):
    """Horizontal stripes; the caption says how many."""

    len_train = 100  # training items; None is endless
    len_val = 8  # held-out items

    def __init__(
        self,
        size: int = 32,  # pixels on a side
        batch: int = 8,  # images in a batch
        seed: int = 0,  # of the order of training
        workers: int = 0,  # processes that make images
    ) -> None:
        super().__init__(batch, seed, workers)
        self.size = size

    def digest(self) -> str:
        """It enters the hash of every model trained on these images."""
        return "stripes 1"  # another number whenever the images change

    def batch_of(self, turns: Sequence[Turn], split: Split) -> Batch:
        """The items of these (index, turn); images (B, 3, size, size) in [-1, 1]."""
        counts = [1 + index % 4 for index, _ in turns]
        rows = torch.arange(self.size) / self.size
        waves = torch.stack([torch.cos(2 * torch.pi * count * rows) for count in counts])
        images = waves[:, None, :, None].expand(-1, 3, -1, self.size).contiguous()
        return Batch(images, [f"{count} stripes" for count in counts])
