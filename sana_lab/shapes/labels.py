"""What the pictures of a batch of the embedded world show, for networks that learn it from more than captions."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from sana_lab.shapes import scenes as world
from sana_lab.shapes.data import Shapes
from sana_lab.shapes.scenes import COLORS, MOST, SHAPES, Scenes
from sana_lab.types import Batch

HELD_OUT = -1  # the seed of the scenes that no training seed makes


def training_scenes(trainer: L.Trainer, batch: Batch) -> Scenes:
    """The scenes of the training batch that the trainer is at. ValueError where they are no scenes."""
    data = _shapes(trainer)
    place: Any = trainer.fit_loop.epoch_loop
    n = place.total_batch_idx * trainer.world_size + trainer.global_rank  # as `data.stream.Endless` counts
    rows = world.scenes(data.seed, range(n * data.batch, (n + 1) * data.batch), data.shares)
    if place.batch_idx == 0:
        check(rows, batch)
    return rows


def held_out_scenes(indices: Sequence[int], batch: Batch) -> Scenes:
    """The held-out scenes with these indices, which the batch must show."""
    rows = world.scenes(HELD_OUT, indices)
    check(rows, batch)
    return rows


def validation_scenes(trainer: L.Trainer, batch: Batch, batch_idx: int) -> Scenes:
    """The scenes of the validation batch with this number on this rank."""
    data = _shapes(trainer)
    starts = range(0, data.held_out, data.batch)
    first = (starts[trainer.global_rank :: trainer.world_size] if len(starts) >= trainer.world_size else starts)[
        batch_idx
    ]
    return held_out_scenes(range(first, first + len(batch.prompts)), batch)


def check(rows: Scenes, batch: Batch) -> None:
    """ValueError unless the batch's pictures are of these scenes."""
    if batch.images is None or not _as_drawn(batch.images, rows):
        raise ValueError("the pictures are not of the embedded world's scenes; expected data: shapes")


def class_counts(rows: Scenes) -> Tensor:
    """(B, K) how many objects of each class, shape by shape."""
    there = np.arange(MOST) < rows.count[:, None]
    counts = np.zeros((len(rows.count), len(SHAPES) * len(COLORS)), np.int64)
    np.add.at(counts, (np.nonzero(there)[0], (rows.shape * len(COLORS) + rows.color)[there]), 1)
    return torch.from_numpy(counts)


def cell_classes(rows: Scenes, side: int = 8) -> Tensor:
    """(B, side * side) the class of the object around whose middle each cell's middle lies within its radius, or K."""
    middles = (np.arange(side) + 0.5) / side
    places = np.stack(np.meshgrid(middles, middles), -1).reshape(1, -1, 1, 2)  # (1, N, 1, 2)
    away = np.linalg.norm(places - rows.center[:, None], axis=-1)  # (B, N, M)
    inside = (away < rows.radius[:, None]) & (np.arange(MOST) < rows.count[:, None])[:, None]
    classes = np.take_along_axis(rows.shape * len(COLORS) + rows.color, inside.argmax(-1), 1)
    return torch.from_numpy(np.where(inside.any(-1), classes, len(SHAPES) * len(COLORS)))


def _shapes(trainer: L.Trainer) -> Shapes:
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, Shapes):
        raise ValueError(f"this system learns the embedded world from data: shapes; given {type(data).__name__}")
    return data


def _as_drawn(images: Tensor, rows: Scenes) -> bool:
    drawn = torch.from_numpy(world.draw(rows, images.shape[-1])).to(images)
    return drawn.shape == images.shape and bool((images.add(1).mul(127.5) - drawn).abs().max() < 1)
