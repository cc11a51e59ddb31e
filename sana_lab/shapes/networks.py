"""Networks of the embedded world: an attribute network that counts objects, and a small CLIP.

Both are small enough for a CPU, are trained by shipped experiments (`shapes_attributes`, `shapes_clip`) and are not
valid for other images. Legend: B images or texts, K = 40 classes (shape and colour, ordered by shape), D features.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from sana_lab.config.specs import SpecError
from sana_lab.models.layers import Downsample
from sana_lab.models.text.tokenizer import (
    check_prompts,
    count_truncated,
    offline_tokenizer,
    pad_rows,
    padding_id,
    token_rows,
)
from sana_lab.shapes.scenes import COLORS, MAX_OBJECTS, SHAPES

SIDE = 64  # pixels a side of both networks' input
CLASSES = len(SHAPES) * len(COLORS)


class Attributes(nn.Module):
    """Convolutional network that predicts the class in each cell of an image and the number of objects of each class.

    Each width is a stage of stride 2, so three give 8 x 8 cells. The features are the mean of the last stage over the
    cells; counts are a linear map of them, so they carry contents without positions.
    """

    GAIN = 16.0  # of features before the counts: one object covers about a sixteenth of the cells

    def __init__(self, widths: Sequence[int] = (16, 48, 96)) -> None:
        super().__init__()
        if not widths or min(widths) < 1:
            raise SpecError(f"widths is {list(widths)}, expected one or more numbers from 1")
        self.dim = widths[-1]
        self.body = nn.Sequential(*[Downsample(a, b) for a, b in zip((3, *widths), widths, strict=False)])
        self.cells = nn.Linear(self.dim, CLASSES + 1)
        self.counts = nn.Linear(self.dim, CLASSES * (MAX_OBJECTS + 1))

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, 64, 64) in [-1, 1] -> (B, D)."""
        return self.body(images).mean((2, 3))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, 64, 64) in [-1, 1] -> logits of the class of each cell (B, N, K + 1), of which the last is the
        background, and of the count of each class (B, K, 5)."""
        cells = self.body(images)
        counts = self.counts(self.GAIN * cells.mean((2, 3)))
        return self.cells(cells.flatten(2).mT), counts.unflatten(1, (CLASSES, MAX_OBJECTS + 1))


class Clip(nn.Module):
    """A tiny transformers CLIP with the offline tokenizer; texts are truncated to `max_tokens`."""

    def __init__(
        self,
        width: int = 64,
        layers: int = 4,
        text_layers: int = 2,
        heads: int = 4,
        patch: int = 8,
        dim: int = 64,
        max_tokens: int = 32,
    ) -> None:
        super().__init__()
        if SIDE % patch or width % heads or max_tokens < 2:
            raise SpecError(
                f"patch is {patch}, width {width}, heads {heads} and max_tokens {max_tokens}; expected a patch that "
                f"divides {SIDE}, a width that heads divide and at least 2 tokens"
            )
        self.tokenizer, self.max_tokens = offline_tokenizer(start=False), max_tokens
        tower = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": heads}
        special = {"pad_token_id": padding_id(self.tokenizer), "bos_token_id": None}
        text = {"vocab_size": len(self.tokenizer), "max_position_embeddings": max_tokens, **special}
        self.network = CLIPModel(
            CLIPConfig(
                text_config=tower
                | text
                | {"num_hidden_layers": text_layers, "eos_token_id": self.tokenizer.eos_token_id},
                vision_config=tower | {"num_hidden_layers": layers, "image_size": SIDE, "patch_size": patch},
                projection_dim=dim,
            )
        )

    @property
    def scale(self) -> Tensor:
        """Factor of cosines before the softmax; at most 100, as in CLIP."""
        return self.network.logit_scale.exp().clamp(max=100)

    def image_features(self, images: Tensor) -> Tensor:
        """(B, 3, 64, 64) in [-1, 1] -> (B, D) of length 1."""
        return self.project(self.image_states(images).pooler_output)

    def image_states(self, images: Tensor) -> Any:
        """The image tower's last hidden state (B, 1 + N, W) of class token and patches, and its pooled state (B, W)."""
        return self.network.vision_model(pixel_values=images)

    def project(self, pooled: Tensor) -> Tensor:
        """Pooled states of images (B, W) -> features (B, D) of length 1."""
        return F.normalize(self.network.visual_projection(pooled), dim=-1)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """(B, D) of length 1. ValueError without prompts, or for one that is not text."""
        rows = token_rows(self.tokenizer, check_prompts(prompts), self.max_tokens)
        ids, mask = (x.to(self.network.device) for x in pad_rows(rows, padding_id(self.tokenizer)))
        return F.normalize(self.network.get_text_features(ids, mask.long()).pooler_output, dim=-1)

    def are_truncated(self, prompts: Sequence[str]) -> list[bool]:
        """Which prompts are longer than `max_tokens`."""
        rows = token_rows(self.tokenizer, prompts, self.max_tokens)
        truncated = count_truncated(self.tokenizer, prompts, rows, self.max_tokens)
        return [i in truncated for i in range(len(prompts))]

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The cosine (B,) between each image and its prompt."""
        return (self.image_features(images) * self.text_features(prompts)).sum(-1)


def as_input(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return images.float().mul(2 / 255).sub(1)


@torch.no_grad()
def count(network: Attributes, images: Tensor) -> Tensor:
    """Predicted number of objects of each class (B, K) in images (B, 3, 64, 64) in [-1, 1]."""
    return network(images)[1].argmax(-1)
