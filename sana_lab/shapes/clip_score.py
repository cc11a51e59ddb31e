"""CLIP score of the embedded world with its small CLIP: `clip_shapes`."""

from collections.abc import Sequence
from typing import Annotated, final

import torch
from torch import Tensor

from sana_lab.checkpoints.networks import trained
from sana_lab.config.ranges import BatchSize
from sana_lab.config.specs import RUNTIME
from sana_lab.environment import place
from sana_lab.evaluation import Measure, Report
from sana_lab.evaluation.extractors.resize import resize
from sana_lab.evaluation.per_prompt import PromptScores
from sana_lab.shapes.networks import SIDE, Clip, as_input
from sana_lab.types import Json


@final
class ClipShapes(Measure):
    """100 x the mean cosine between images and prompts, not clamped; the interval is over prompts.

    The CLIP is trained only on the embedded world, so its scores are not comparable with other CLIP scores. It
    distinguishes objects, colours and counts, but neither positions nor which object has which colour. SpecError for
    weights of another network.
    """

    own_prompts = False

    def __init__(
        self,
        weights: str = "experiment:shapes_clip",  # experiment:NAME or the weights file of such an experiment
        batch: Annotated[BatchSize, RUNTIME] = 64,  # images at a time
        device: Annotated[str, RUNTIME] = "auto",  # auto, cpu, cuda, cuda:1 ...
    ) -> None:
        self.batch, self.device = batch, place(device)
        network, self.weights_sha256 = trained(weights, Clip)
        self.network = network.to(self.device)
        self.scores = PromptScores()

    def add(self, images: Tensor, rows: Sequence[Json]) -> None:
        self.collect(self.extract(images, rows), rows)

    @torch.no_grad()
    def extract(self, images: Tensor, rows: Sequence[Json]) -> list[float]:
        prompts, scores = [row["prompt"] for row in rows], []
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images and {len(prompts)} prompts; expected a prompt for each image")
        for first in range(0, len(prompts), self.batch):
            part = slice(first, first + self.batch)
            pixels = as_input(resize(images[part].to(self.device), SIDE, "clean"))
            scores += (100 * self.network(pixels, prompts[part])).tolist()
        return scores

    def collect(self, extracted: list[float], rows: Sequence[Json]) -> None:
        prompts = [row["prompt"] for row in rows]
        self.scores.add(prompts, extracted)
        self.scores.truncated.update(zip(prompts, self.network.are_truncated(prompts), strict=True))

    def report(self) -> Report:
        values = {"clip_shapes": self.scores.mean()}
        return Report(values, self._settings(), {"clip_shapes": list(self.scores.values)})

    def _settings(self) -> Json:
        return {
            "model": "shapes_clip",
            "formula": "100 x mean cosine, no clamp",
            "weights_sha256": self.weights_sha256,
            "resize": "clean",
            "side": SIDE,
            "dtype": "float32",
            "max_tokens": self.network.max_tokens,
            "truncated_percent": self.scores.truncated_percent().value,
            **self.scores.counts(),
        }
