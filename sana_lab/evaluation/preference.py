"""Common parts of learned preference scores (`image_reward`, `hps`), whose networks come from optional packages."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

from sana_lab.config.specs import SpecError
from sana_lab.evaluation import Report
from sana_lab.evaluation.per_prompt import PromptScores
from sana_lab.types import Json


class Scorer(Protocol):
    """Scores how well one image suits its prompt."""

    def score(self, prompt: str, image: Tensor) -> float:
        """Score of one uint8 (3, H, W) image."""
        ...

    def is_truncated(self, prompt: str) -> bool:
        """Whether the network reads only the beginning of the prompt."""
        ...

    def identity(self) -> Json:
        """Everything the scores depend on."""
        ...


class PreferenceScores:
    """Scores of all images, reported as their mean under the name of a column."""

    def __init__(self, column: str, scorer: Scorer) -> None:
        self.column, self.scorer, self.scores = column, scorer, PromptScores()

    def add(self, images: Tensor, rows: Sequence[Json]) -> None:
        """Score images (B, 3, H, W) uint8."""
        self.collect(self.extract(images, rows), rows)

    def extract(self, images: Tensor, rows: Sequence[Json]) -> list[float]:
        """Scores of images (B, 3, H, W) uint8."""
        return [self.scorer.score(row["prompt"], image) for row, image in zip(rows, images, strict=True)]

    def collect(self, values: Sequence[float], rows: Sequence[Json]) -> None:
        """Add scores."""
        prompts = [row["prompt"] for row in rows]
        self.scores.add(prompts, values)
        new = (p for p in prompts if p not in self.scores.truncated)
        self.scores.truncated |= {p: self.scorer.is_truncated(p) for p in new}

    def report(self) -> Report:
        """The mean and the percentage of truncated prompts."""
        truncated = self.scores.truncated_percent()
        values = {self.column: self.scores.mean(), f"{self.column}_truncated": truncated}
        settings = {**self.scorer.identity(), **self.scores.counts(), "truncated_percent": truncated.value}
        return Report(values, settings, {self.column: list(self.scores.values)})


def import_package(module: str, name: str) -> Any:
    """An optional package. ImportError says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this measure needs the package {name}: pip install {name} ({error})") from error


def check_file(path: str, what: str) -> None:
    """SpecError without the file."""
    if not Path(path).is_file():
        raise SpecError(f"there is no file {path!r}; expected {what}")


def pil_image(image: Tensor) -> Image.Image:
    """Of uint8 (3, H, W)."""
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
