"""How well pictures of the embedded world fit their prompts, by the world's own small CLIP: `clip_shapes`."""

from collections.abc import Sequence
from typing import Annotated, final

import torch
from torch import Tensor

from sana_lab.config.specs import RUNTIME
from sana_lab.environment import place
from sana_lab.evaluation import Measure, Report
from sana_lab.evaluation.extractors.resize import resize
from sana_lab.evaluation.per_prompt import Scored
from sana_lab.shapes.networks import SIDE, Clip, as_input, trained
from sana_lab.types import Json


@final
class ClipShapes(Measure):
    """100 times the mean cosine between pictures and prompts, not clamped; the interval is over prompts.

    The CLIP is `shapes_clip`, which has seen nothing but the embedded world, so that its numbers compare with no other
    CLIP's. It knows what there is and how many, but neither where nor which colour is whose. `weights` is
    `experiment:NAME` or the weights file of an experiment that trains such a network. SpecError.
    """

    def __init__(
        self,
        weights: str = "experiment:shapes_clip",
        batch: Annotated[int, RUNTIME] = 64,
        device: Annotated[str, RUNTIME] = "auto",
    ) -> None:
        self.batch, self.device = batch, place(device)
        network, self.weights_sha256 = trained(weights, Clip)
        self.network = network.to(self.device)
        self.scored = Scored()

    @torch.no_grad()
    def add(self, images: Tensor, rows: Sequence[Json]) -> None:
        prompts = [row["prompt"] for row in rows]
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images and {len(prompts)} prompts; expected a prompt for each image")
        for first in range(0, len(prompts), self.batch):
            part = slice(first, first + self.batch)
            shown = as_input(resize(images[part].to(self.device), SIDE, "clean"))
            self.scored.add(prompts[part], (100 * self.network(shown, prompts[part])).tolist())
            self.scored.cut.update(zip(prompts[part], self.network.are_cut(prompts[part]), strict=True))

    def report(self) -> Report:
        values = {"clip_shapes": self.scored.mean()}
        return Report(values, self._settings(), {"clip_shapes": list(self.scored.values)})

    def _settings(self) -> Json:
        return {
            "model": "shapes_clip",
            "formula": "100 x mean cosine, no clamp",
            "weights_sha256": self.weights_sha256,
            "resize": "clean",
            "side": SIDE,
            "dtype": "float32",
            "max_tokens": self.network.max_tokens,
            "truncated_percent": self.scored.share_cut().value,
            **self.scored.counts(),
        }
