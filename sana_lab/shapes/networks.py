"""The embedded world's own networks: one counts what a picture shows, one compares pictures with captions.

Both are small enough for a CPU, are trained by shipped experiments (`shapes_attributes`, `shapes_clip`) and say nothing
about photographs. Legend: B pictures or texts, K = 40 classes, a shape in a colour, shape by shape, D features.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from sana_lab.checkpoints import weights
from sana_lab.config import experiments, specs
from sana_lab.config.digests import sha256
from sana_lab.config.specs import SpecError
from sana_lab.models.text.tokenizer import (
    check_prompts,
    count_truncated,
    offline_tokenizer,
    pad_rows,
    padding_id,
    token_rows,
)
from sana_lab.shapes.scenes import COLORS, MOST, SHAPES

SIDE = 64  # pixels a side of what both look at
CLASSES = len(SHAPES) * len(COLORS)

Network = TypeVar("Network", bound=nn.Module)


class Attributes(nn.Module):
    """What a picture of the embedded world shows: the class in each of its cells, and how many there are of each class.

    Each width is a stage at half the side, so three make 8 x 8 cells. The features are the mean of the last stage over
    the cells, which the counts are read from by one linear map: they know what there is, and not where.
    """

    GAIN = 16.0  # for the counts: one object fills about a sixteenth of the cells

    def __init__(self, widths: Sequence[int] = (16, 48, 96)) -> None:
        super().__init__()
        if not widths or min(widths) < 1:
            raise SpecError(f"widths is {list(widths)}, expected one or more numbers from 1")
        self.dim = widths[-1]
        self.body = nn.Sequential(*[_Stage(a, b) for a, b in zip((3, *widths), widths, strict=False)])
        self.cells = nn.Linear(self.dim, CLASSES + 1)
        self.counts = nn.Linear(self.dim, CLASSES * (MOST + 1))

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, 64, 64) in [-1, 1] -> (B, D)."""
        return self.body(images).mean((2, 3))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, 64, 64) in [-1, 1] -> logits of each cell's class (B, N, K + 1), the last of which is the ground, and
        of each class's count (B, K, 5)."""
        seen = self.body(images)
        counts = self.counts(self.GAIN * seen.mean((2, 3)))
        return self.cells(seen.flatten(2).mT), counts.unflatten(1, (CLASSES, MOST + 1))


class _Stage(nn.Module):
    """Two 3 x 3 convolutions, the first of stride 2; normalised in each place, as over a picture would hide counts."""

    def __init__(self, inside: int, out: int) -> None:
        super().__init__()
        self.down, self.same = nn.Conv2d(inside, out, 3, 2, 1), nn.Conv2d(out, out, 3, 1, 1)
        self.norms = nn.ModuleList([nn.RMSNorm(out), nn.RMSNorm(out)])

    def forward(self, x: Tensor) -> Tensor:
        for convolve, norm in zip((self.down, self.same), self.norms, strict=True):
            x = F.silu(norm(convolve(x).movedim(1, -1)).movedim(-1, 1))
        return x


class Clip(nn.Module):
    """transformers' CLIP at toy size, from nothing, on the lab's offline tokenizer; texts are cut to `max_tokens`."""

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
        """What cosines are multiplied with before a softmax; at most 100, as in CLIP."""
        return self.network.logit_scale.exp().clamp(max=100)

    def pictures(self, images: Tensor) -> Tensor:
        """(B, 3, 64, 64) in [-1, 1] -> directions (B, D) of length 1."""
        return self.directions(self.look(images).pooler_output)

    def look(self, images: Tensor) -> Any:
        """The picture tower's last states, of the whole and of each patch (B, 1 + N, W), and the whole's pooled one."""
        return self.network.vision_model(pixel_values=images)

    def directions(self, pooled: Tensor) -> Tensor:
        """Pooled states of pictures (B, W) -> (B, D) of length 1."""
        return F.normalize(self.network.visual_projection(pooled), dim=-1)

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Directions (B, D) of length 1. ValueError where there is no prompt, or one is not text."""
        rows = token_rows(self.tokenizer, check_prompts(prompts), self.max_tokens)
        ids, mask = (x.to(self.network.device) for x in pad_rows(rows, padding_id(self.tokenizer)))
        return F.normalize(self.network.get_text_features(ids, mask.long()).pooler_output, dim=-1)

    def are_cut(self, prompts: Sequence[str]) -> list[bool]:
        """Which of the prompts are longer than what is read."""
        rows = token_rows(self.tokenizer, prompts, self.max_tokens)
        cut = count_truncated(self.tokenizer, prompts, rows, self.max_tokens)
        return [i in cut for i in range(len(prompts))]

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The cosine (B,) between each picture and its prompt."""
        return (self.pictures(images) * self.texts(prompts)).sum(-1)


def trained(reference: str, kind: type[Network]) -> tuple[Network, str]:
    """The network of `experiment:NAME`, or of a weights file of one, for evaluation, and the sha256 of its file.

    SpecError where there is none, or its weights do not fit.
    """
    path = weights.find(reference)
    name = weights.card(path).get("experiment", reference.removeprefix("experiment:"))
    system = experiments.load(name)["system"]
    network = kind(**{key: system[key] for key in specs.options("", kind) if key in system})
    weights.load_state(network, weights.read(path), "network.", reference)
    return network.eval().requires_grad_(False), sha256(path)


def as_input(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return images.float().mul(2 / 255).sub(1)


@torch.no_grad()
def count(network: Attributes, images: Tensor) -> Tensor:
    """How many of each class (B, K) the network sees in pictures (B, 3, 64, 64) in [-1, 1]."""
    return network(images)[1].argmax(-1)
