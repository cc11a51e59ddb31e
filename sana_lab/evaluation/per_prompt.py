"""Bookkeeping of measures with prompts: one score per image, and which of a benchmark's rows have images."""

from collections.abc import Sequence

import numpy as np

from sana_lab.config.specs import nearest
from sana_lab.intervals import Estimate, clustered_mean
from sana_lab.types import Json


class PromptScores:
    """One score per image with its prompt, and which prompts the scoring network truncated."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.prompts: list[str] = []  # of each image
        self.truncated: dict[str, bool] = {}  # distinct prompt -> whether the network read only its beginning

    def add(self, prompts: Sequence[str], values: Sequence[float]) -> None:
        """Append one score per image. ValueError for a score that is not finite, with its prompt."""
        for prompt, value in zip(prompts, values, strict=True):
            if not np.isfinite(value):
                raise ValueError(f"the score of an image for {prompt!r} is {value}")
            self.prompts.append(prompt)
            self.values.append(float(value))

    def mean(self) -> Estimate:
        """Mean over images; images of one prompt are one cluster. ValueError without images."""
        return clustered_mean(self.values, self.prompts)

    def truncated_percent(self) -> Estimate:
        """Percentage of distinct prompts that were truncated."""
        n = len(self.truncated)
        return Estimate(100 * sum(self.truncated.values()) / n, None, None, n)

    def counts(self) -> Json:
        return {"images": len(self.values), "prompts": len(set(self.prompts))}


class Coverage:
    """Number of images per row of a benchmark, so that a part of it is never reported as the whole."""

    def __init__(
        self, rows: Sequence[Json], images_per_prompt: int, key: str = "prompt", times: Sequence[int] | None = None
    ) -> None:
        """`key` is the field that identifies a row; a row's images are `images_per_prompt`, by `times` if given.

        ValueError for duplicates.
        """
        if images_per_prompt < 1:
            raise ValueError(f"images_per_prompt is {images_per_prompt}, expected at least 1")
        self.rows, self.images_per_prompt, self.key = rows, images_per_prompt, key
        self.indices = {row[key]: i for i, row in enumerate(rows)}
        self.counts = [0] * len(rows)  # images of each row
        self.expected = [images_per_prompt * n for n in times or [1] * len(rows)]
        if len(self.indices) < len(rows):
            raise ValueError(f"two of the {len(rows)} rows have the same {key}, expected distinct ones")

    def index_of(self, row: Json) -> int:
        """Index of the row with the same key. ValueError for a row of another benchmark."""
        name = row.get(self.key)
        if name not in self.indices:
            near = nearest(str(name), map(str, self.indices)) if len(self.indices) < 100 else "see its file"
            raise ValueError(f"{self.key} {name!r} is none of this benchmark's {len(self.rows)}; {near}")
        return self.indices[name]

    def count(self, index: int) -> None:
        """Count one image of a row."""
        self.counts[index] += 1

    @property
    def partial(self) -> bool:
        """Whether a row has fewer images than expected, or rows have different shares of theirs."""
        shares = {n / expected for n, expected in zip(self.counts, self.expected, strict=True)}
        return len(shares) > 1 or min(shares) < 1

    def settings(self) -> Json:
        counts = [n for n in self.counts if n]
        return {
            "partial": self.partial,
            "prompts": len(counts),
            "prompts_expected": len(self.rows),
            "images": sum(counts),
            "images_expected": sum(self.expected),
            "images_per_prompt": sorted(set(counts)),
        }
