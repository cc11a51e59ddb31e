"""Several seeds of the sampling noise in one evaluation (`eval.noise_seeds`): same weights and prompts, more images.

A measure gets the images of all seeds, those of one prompt together, so that its intervals and paired tests cluster
them by prompt. The images of the first seed are those of an evaluation with that seed alone.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sana_lab.config import specs
from sana_lab.config.specs import Spec
from sana_lab.evaluation import Measure, Report
from sana_lab.types import Json

Generate = Callable[[list[str], list[int]], Tensor]
"""(prompts, noise indices) -> images (B, 3, H, W) uint8"""


def seeds(options: Json) -> list[int]:
    """The seeds of the noise under `eval:` options: `seed` and those after it."""
    return list(range(options["seed"], options["seed"] + options.get("noise_seeds", 1)))


def build_measure(spec: Spec, count: int) -> Measure:
    """A measure that expects its images per prompt from each of `count` seeds."""
    resolved = specs.resolve("measure", spec)
    if (has_option := "images_per_prompt" in resolved) and count > 1:
        resolved["images_per_prompt"] *= count
    measure: Measure = specs.build("measure", resolved)
    if not has_option and count > 1:
        measure.images_per_prompt *= count
    return measure


def pooled(generators: Sequence[Generate], images_per_prompt: int) -> Generate:
    """One generator of all seeds. Image k of a row is of seed k // n and has there the noise index row * n + k % n,
    where n is `images_per_prompt` of one seed."""
    if len(generators) == 1:
        return generators[0]

    def generate(prompts: list[str], indices: list[int]) -> Tensor:
        places = [_place(i, images_per_prompt, len(generators)) for i in indices]
        images: dict[int, Tensor] = {}
        for seed, single in enumerate(generators):
            own = [j for j, (its_seed, _) in enumerate(places) if its_seed == seed]
            if own:
                images |= dict(zip(own, single([prompts[j] for j in own], [places[j][1] for j in own]), strict=True))
        return torch.stack([images[j] for j in range(len(indices))])

    return generate


def _place(index: int, images_per_prompt: int, count: int) -> tuple[int, int]:
    """(seed, noise index of that seed) of image `index` of all."""
    row, image = divmod(index, images_per_prompt * count)
    seed, k = divmod(image, images_per_prompt)
    return seed, row * images_per_prompt + k


def values_by_seed(report: Report, images_per_prompt: int, count: int) -> dict[str, list[float]]:
    """column -> its value on the images of each seed; `images_per_prompt` is that of all seeds together."""
    per_seed = images_per_prompt // count
    columns = {name: torch.tensor(list(values), dtype=torch.float64) for name, values in report.per_image.items()}
    return {name: v.view(-1, count, per_seed).mean((0, 2)).tolist() for name, v in columns.items()}
