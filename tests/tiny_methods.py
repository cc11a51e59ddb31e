"""Models and steps for tests of training methods."""

from collections.abc import Sequence
from typing import Any

import tiny
import torch
from torch import Tensor

from sana_lab.methods import Grid, Model, Step
from sana_lab.types import WHOLE, Batch, Part

GRID = (4, 4)


def model(**changes: Any) -> Model:
    return Model(**{"dit": tiny.dit(depth=4, mean_velocity=True), "size": 64, "grid": GRID, "batch": 4, **changes})


def step(blocks: Sequence[int] = (), rows: int = 4, draws: int = 1, part: Part = WHOLE, grid: Grid = GRID) -> Step:
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    n = rows * draws
    images = torch.rand(rows, 3, *(16 * side for side in grid), generator=random) * 2 - 1
    return Step(
        batch=Batch(images, ["a red circle"] * rows),
        text=tiny.caption([3] * rows),
        latents=normal(n, 4, *grid),
        noise=normal(n, 4, *grid),
        times=torch.rand(n, generator=random),
        target=normal(n, 4, *grid),
        random=torch.Generator().manual_seed(1),
        pixels=lambda: images,
        null=lambda: tiny.caption([1], seed=5),
        draws=draws,
        part=part,
        prediction=normal(n, 4, *grid),
        hidden={block: normal(n, *grid, 32) for block in blocks},
    )
