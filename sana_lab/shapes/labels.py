"""Ground-truth labels of a batch of the embedded world: scenes, object counts, class maps."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from sana_lab.shapes import scenes as world
from sana_lab.shapes.data import HELD_OUT, Shapes
from sana_lab.shapes.scenes import COLORS, MAX_OBJECTS, SHAPES, Scenes
from sana_lab.types import Batch, Part


def training_scenes(trainer: L.Trainer, batch: Batch) -> Scenes:
    """The scenes of the current training batch. ValueError if the images do not match them."""
    data = _shapes(trainer)
    loop: Any = trainer.fit_loop.epoch_loop
    n = loop.total_batch_idx  # as `data.stream.Endless` counts
    rows = world.scenes(
        data.seed, Part.of_trainer(trainer).of(range(n * data.batch, (n + 1) * data.batch)), data.shares
    )
    if loop.batch_idx == 0:
        check(rows, batch)
    return rows


def held_out_scenes(indices: Sequence[int], batch: Batch) -> Scenes:
    """The held-out scenes with these indices. ValueError if the batch's images do not match them."""
    rows = world.scenes(HELD_OUT, indices)
    check(rows, batch)
    return rows


def validation_scenes(trainer: L.Trainer, batch: Batch, batch_idx: int) -> Scenes:
    """The scenes of validation batch `batch_idx`."""
    first = batch_idx * _shapes(trainer).batch
    return held_out_scenes(range(first, first + len(batch.prompts)), batch)


def check(rows: Scenes, batch: Batch) -> None:
    """ValueError unless the batch's images are of these scenes."""
    if batch.images is None or not _matches(batch.images, rows):
        raise ValueError("the images are not of the embedded world's scenes; expected data: shapes")


def class_counts(rows: Scenes) -> Tensor:
    """(B, K) number of objects of each class, ordered by shape, then colour."""
    mask = np.arange(MAX_OBJECTS) < rows.count[:, None]
    counts = np.zeros((len(rows.count), len(SHAPES) * len(COLORS)), np.int64)
    np.add.at(counts, (np.nonzero(mask)[0], (rows.shape * len(COLORS) + rows.color)[mask]), 1)
    return torch.from_numpy(counts)


def cell_classes(rows: Scenes, side: int = 8) -> Tensor:
    """(B, side * side) class of the object whose circle contains each cell's centre, K for the background."""
    centers = (np.arange(side) + 0.5) / side
    cells = np.stack(np.meshgrid(centers, centers), -1).reshape(1, -1, 1, 2)  # (1, N, 1, 2)
    distances = np.linalg.norm(cells - rows.center[:, None], axis=-1)  # (B, N, M)
    inside = (distances < rows.radius[:, None]) & (np.arange(MAX_OBJECTS) < rows.count[:, None])[:, None]
    classes = np.take_along_axis(rows.shape * len(COLORS) + rows.color, inside.argmax(-1), 1)
    return torch.from_numpy(np.where(inside.any(-1), classes, len(SHAPES) * len(COLORS)))


def _shapes(trainer: L.Trainer) -> Shapes:
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, Shapes):
        raise ValueError(f"this system learns the embedded world from data: shapes; given {type(data).__name__}")
    return data


def _matches(images: Tensor, rows: Scenes) -> bool:
    expected = torch.from_numpy(world.render(rows, images.shape[-1])).to(images)
    return expected.shape == images.shape and bool((images.add(1).mul(127.5) - expected).abs().max() < 1)
