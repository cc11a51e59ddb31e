"""ImageReward (arXiv 2304.05977), a learned human preference score, by the package `image-reward` and local files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, final

import torch
from torch import Tensor

from sana_lab.config import digests
from sana_lab.config.specs import RUNTIME
from sana_lab.environment import place
from sana_lab.evaluation import Measure, Report
from sana_lab.evaluation.preference import PreferenceScores, check_file, import_package, pil_image
from sana_lab.types import Json

TOKENS = 35
"""Length of the text that the network reads."""


@final
class ImageReward(Measure):
    """Mean reward `image_reward`, and `image_reward_truncated`, the percentage of prompts above 35 tokens.

    The package scales rewards itself: (r - 0.167) / 1.033. Its tokenizer is bert-base-uncased from the hub's local
    cache. SpecError for missing files; ImportError names the package.
    """

    own_prompts = False

    def __init__(
        self,
        model: str,  # path of ImageReward.pt
        config: str,  # path of its med_config.json
        device: Annotated[str, RUNTIME] = "auto",  # auto, cpu, cuda, cuda:1 ...
    ) -> None:
        self.scores = PreferenceScores("image_reward", Scorer(model, config, device))

    def add(self, images: Tensor, rows: Sequence[Json]) -> None:
        self.collect(self.extract(images, rows), rows)

    def extract(self, images: Tensor, rows: Sequence[Json]) -> list[float]:
        return self.scores.extract(images, rows)

    def collect(self, extracted: list[float], rows: Sequence[Json]) -> None:
        self.scores.collect(extracted, rows)

    def report(self) -> Report:
        return self.scores.report()


class Scorer:
    """The package's network."""

    def __init__(self, model: str, config: str, device: str) -> None:
        for path in (model, config):
            check_file(path, "ImageReward.pt and med_config.json from the hub's THUDM/ImageReward")
        package = import_package("ImageReward", "image-reward")
        self.network = package.load(model, device=str(place(device)), med_config=config)
        self.weights_sha256 = digests.sha256(Path(model))

    @torch.no_grad()
    def score(self, prompt: str, image: Tensor) -> float:
        return float(self.network.score(prompt, pil_image(image)))

    def is_truncated(self, prompt: str) -> bool:
        return len(self.network.blip.tokenizer(prompt)["input_ids"]) > TOKENS

    def identity(self) -> Json:
        return {"scorer": "ImageReward", "weights_sha256": self.weights_sha256, "max_tokens": TOKENS}
