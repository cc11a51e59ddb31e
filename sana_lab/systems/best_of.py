"""Best of N: several images of each prompt from different noise, of which a measure chooses one.

The first candidate is the image that is sampled without a choice, and those of N are among those of more, so that the
best score does not fall with N. Among equal scores the first is kept. With the measure that judges the result this is
an oracle, an upper bound of what a choice can reach.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sana_lab.config import specs
from sana_lab.config.specs import Spec


def candidates(indices: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """Keys of the noise of `count` candidates for each image index, those of one image in succession."""
    return [(i, k) if k else (i,) for i in indices for k in range(count)]


def repeated(texts: Sequence[str], count: int) -> list[str]:
    """Each text `count` times in succession."""
    return [text for text in texts for _ in range(count)]


def best(images: Tensor, prompts: Sequence[str], by: Spec) -> Tensor:
    """The image (B, 3, H, W) of each of B prompts that a measure scores highest, of candidates (B N, 3, H, W) uint8 in
    succession. SpecError for a measure that scores no single images."""
    count = len(images) // len(prompts)
    scores = torch.tensor(_measure(json.dumps(by)).score_images(images, repeated(prompts, count)), dtype=torch.float64)
    chosen = [max(range(count), key=row.__getitem__) for row in scores.view(-1, count).tolist()]  # the first maximum
    return images[[i * count + k for i, k in enumerate(chosen)]]


@lru_cache(maxsize=1)
def _measure(spec: str) -> Any:
    """The measure of a spec in JSON, built once for all batches."""
    return specs.build("measure", json.loads(spec))
