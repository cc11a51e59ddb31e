"""The embedded world for tests: short trainings of its networks, scenes made by hand, rendered images."""

from collections.abc import Sequence

import lightning as L
import numpy as np
import tiny
import torch
from torch import Tensor

from sana_lab.shapes.data import Shapes
from sana_lab.shapes.scenes import COLORS, KINDS, MAX_OBJECTS, SHAPES, Scene, Scenes, Thing, render, scenes

DATA = {"name": "shapes", "size": 64, "batch": 8}


def fit(system, folder, steps: int, data=None, path=None, **options) -> tuple[L.Trainer, list[float]]:
    losses = tiny.Losses()
    run = tiny.trainer(steps, **{"default_root_dir": folder, "callbacks": [losses], "limit_val_batches": 0, **options})
    run.fit(system, datamodule=data or world_data(), ckpt_path=path, weights_only=True)
    return run, losses.values


def world_data() -> Shapes:
    return Shapes(batch=8, held_out=24, seed=5)


def pack(rows: Sequence[Scene]) -> Scenes:
    """Scenes made by hand as a batch to render; the inverse of `scenes.scene`."""
    blank = Thing(SHAPES[0], COLORS[0], (0.5, 0.5), 0.1)
    full = [(*row.things, *[blank] * (MAX_OBJECTS - len(row.things))) for row in rows]
    return Scenes(
        np.array([KINDS.index(row.kind) for row in rows]),
        np.array([len(row.things) for row in rows]),
        np.array([[SHAPES.index(t.shape) for t in row] for row in full]),
        np.array([[COLORS.index(t.color) for t in row] for row in full]),
        np.array([[t.center for t in row] for row in full], np.float32),
        np.array([[t.radius for t in row] for row in full], np.float32),
    )


def images(seed: int, indices: Sequence[int], size: int = 64) -> Tensor:
    """(B, 3, size, size) uint8 of scenes."""
    return torch.from_numpy(render(scenes(seed, indices), size))
