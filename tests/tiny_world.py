"""The embedded world for tests: short trainings of its networks, scenes made by hand, rendered images."""

from collections.abc import Sequence

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from sana_lab.shapes.data import Shapes
from sana_lab.shapes.scenes import COLORS, KINDS, MAX_OBJECTS, SHAPES, Scene, Scenes, Thing, render, scenes

DATA = {"name": "shapes", "size": 64, "batch": 8}


class Losses(Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, *_):
        self.values.append(trainer.callback_metrics["train/loss"].item())


def fit(system, folder, steps: int, data=None, path=None, **options) -> tuple[L.Trainer, list[float]]:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    losses = Losses()
    options = {"limit_val_batches": 0, **options}
    run = L.Trainer(max_steps=steps, accelerator="cpu", default_root_dir=folder, callbacks=[losses], **quiet, **options)
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
