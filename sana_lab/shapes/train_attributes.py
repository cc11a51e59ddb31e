"""The LightningModule that trains the embedded world's attribute network, whose features `fd_shapes` compares."""

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sana_lab.config import specs
from sana_lab.config.specs import Spec, SpecError
from sana_lab.evaluation import Report
from sana_lab.intervals import Estimate, wilson
from sana_lab.shapes.labels import cell_classes, class_counts, held_out_scenes, training_scenes, validation_scenes
from sana_lab.shapes.networks import SIDE, Attributes, count
from sana_lab.shapes.scenes import COLORS, SHAPES, Scenes
from sana_lab.systems import System
from sana_lab.systems.ema import Average
from sana_lab.types import Batch


class AttributesSystem(System):
    """Learns what pictures of the embedded world show (`data: shapes`, 64 px): see `attribute_loss`."""

    def __init__(
        self,
        widths: tuple[int, ...] = (16, 48, 96),
        optimizer: Annotated[Spec, "optimizer"] = "adamw",
        warmup: int = 100,
        decay: float = 0.5,
        ema: float = 0.998,
    ) -> None:
        super().__init__()
        self.network = Attributes(widths)
        self.average = Average(self, ema)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        rows = training_scenes(self.trainer, batch)
        cells, counts = self.network(pictures(batch).contiguous(memory_format=torch.channels_last))
        loss = attribute_loss(cells, counts, rows)
        self.log("train/loss", loss.detach(), batch_size=len(batch.prompts))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        truth = class_counts(validation_scenes(self.trainer, batch, batch_idx))
        with self.averaged():
            right = outcomes(count(self.network, pictures(batch)).cpu(), truth)
        for name, values in right.items():
            self.log(f"val/{name}", values.mean(), batch_size=len(truth), sync_dist=True)


def pictures(batch: Batch) -> Tensor:
    """The batch's images (B, 3, 64, 64). ValueError for others."""
    if batch.images is None or batch.images.shape[1:] != (3, SIDE, SIDE):
        given = None if batch.images is None else tuple(batch.images.shape)
        raise ValueError(f"the embedded world's networks look at pictures of {SIDE} px; given {given}")
    return batch.images


def attribute_loss(cells: Tensor, counts: Tensor, rows: Scenes) -> Tensor:
    """Cross-entropies: of the classes in the cells (B, N, K + 1), ten times their mean, and of how many there are of
    each class (B, K, 5), summed over classes. The cells teach forms in a tenth of the time that counts alone take."""
    where, many = cell_classes(rows, round(cells.shape[1] ** 0.5)).to(cells.device), class_counts(rows).to(cells.device)
    counting = F.cross_entropy(counts.flatten(0, 1), many.flatten(), reduction="sum") / len(many)
    return 10 * F.cross_entropy(cells.flatten(0, 1), where.flatten()) + counting


def outcomes(found: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """For each picture 1 or 0 (B,), from counts (B, K): every class's count is right; the number of objects is; how
    many of each shape there are; how many of each colour."""
    found, truth = (x.unflatten(1, (len(SHAPES), len(COLORS))) for x in (found, truth))
    right = {
        "scene_accuracy": found == truth,
        "number_accuracy": found.sum((1, 2)) == truth.sum((1, 2)),
        "shape_accuracy": found.sum(2) == truth.sum(2),
        "color_accuracy": found.sum(1) == truth.sum(1),
    }
    return {name: same.reshape(len(truth), -1).all(1).float() for name, same in right.items()}


def held_out(system: AttributesSystem, n: int = 1000, batch: int = 100) -> Report:
    """The shares of the first n held-out scenes that are told rightly, with 95 % intervals over scenes.

    `scene_accuracy`: the counts of all 40 classes; `number_accuracy`: of the objects; `shape_accuracy`,
    `color_accuracy`: of each shape and of each colour. SpecError where the system has no experiment.
    """
    data = world_of(system, n)
    found: dict[str, list[float]] = {}
    for first in range(0, n, batch):
        indices = range(first, min(first + batch, n))
        shown = data.batch_at(indices, "val")
        truth = class_counts(held_out_scenes(indices, shown))
        for name, right in outcomes(count(system.network, pictures(shown)), truth).items():
            found.setdefault(name, []).extend(right.tolist())
    return Report(intervals(found), {"scenes": "held-out", "n": n}, found)


def world_of(system: System, n: int) -> Any:
    """The data module of a system's experiment, with n held-out scenes."""
    if system.experiment is None:
        raise SpecError("the system has no experiment, which says what it was trained on; expected what `load` makes")
    return specs.build("data", {**system.experiment["data"], "held_out": n})


def intervals(found: Mapping[str, list[float]]) -> dict[str, Estimate]:
    """The mean of each list of outcomes and its interval, which has a width where all are alike, too."""
    return {name: wilson(values) for name, values in found.items()}
