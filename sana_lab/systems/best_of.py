"""Best of N: several images of each prompt from different noise, of which a measure chooses one.

The first candidate is the image that is sampled without a choice, and those of N are among those of more, so that the
best score does not fall with N. Among equal scores the first is kept. With the measure that judges the result this is
an oracle, an upper bound of what a choice can reach.
"""

import json
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sana_lab.config import specs
from sana_lab.config.specs import Spec, SpecError


def candidates(indices: Sequence[int], count: int, first: int = 0) -> list[tuple[int, ...]]:
    """Keys of the noise of `count` candidates from the `first` for each image index, those of one image in
    succession."""
    return [(i, k) if k else (i,) for i in indices for k in range(first, first + count)]


def repeated(texts: Sequence[str], count: int) -> list[str]:
    """Each text `count` times in succession."""
    return [text for text in texts for _ in range(count)]


def check(by: Spec, prompts: Sequence[str] = ()) -> None:
    """SpecError for a measure that is known to score no single images, or for prompts that it cannot judge; the measure
    is built only for the latter."""
    name = specs.name_of(by)
    if getattr(specs.find("measure", name), "scores_images", None) is False:
        raise SpecError(
            f"best_by is {name}, which scores no single images; expected a measure that does, such as clip_shapes, "
            "exact_shapes, geneval, clip_score, image_reward or hps"
        )
    if prompts:
        _measure(json.dumps(by)).check_prompts(prompts)


def best(images: Tensor, prompts: Sequence[str], by: Spec) -> Tensor:
    """The image (B, 3, H, W) of each of B prompts that a measure scores highest, of candidates (B N, 3, H, W) uint8 in
    succession. SpecError for a measure that scores no single images."""
    return Choice(prompts, by).add(images)


class Choice:
    """The best image so far of each of B prompts, of candidates in parts."""

    def __init__(self, prompts: Sequence[str], by: Spec) -> None:
        self.prompts, self.by = prompts, json.dumps(by)
        self.images, self.scores = torch.empty(0), [-math.inf] * len(prompts)

    def add(self, images: Tensor) -> Tensor:
        """The best (B, 3, H, W) with these candidates (B N, 3, H, W) uint8, those of one prompt in succession."""
        count = len(images) // len(self.prompts)
        scores = _measure(self.by).score_images(images, repeated(self.prompts, count))
        if not len(self.images):
            self.images = images[::count].clone()
        for i, score in enumerate(scores):
            if score > self.scores[i // count]:  # the first of equals is kept
                self.images[i // count], self.scores[i // count] = images[i], score
        return self.images


@lru_cache(maxsize=1)
def _measure(spec: str) -> Any:
    """The measure of a spec in JSON, built once for all batches."""
    return specs.build("measure", json.loads(spec))
