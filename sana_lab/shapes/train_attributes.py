"""`system: attributes`: training of the embedded world's attribute network, the feature extractor of `fd_shapes`."""

from collections.abc import Mapping
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

from sana_lab.config import specs
from sana_lab.config.ranges import Decay, Share, Steps, Widths
from sana_lab.config.schema import Config
from sana_lab.config.specs import Spec, SpecError
from sana_lab.data import DataModule
from sana_lab.evaluation import Report
from sana_lab.intervals import wilson
from sana_lab.shapes.labels import cell_classes, class_counts, held_out_scenes, training_scenes, validation_scenes
from sana_lab.shapes.networks import SIDE, Attributes, count
from sana_lab.shapes.scenes import COLORS, SHAPES, Scenes
from sana_lab.systems import Evaluator, System
from sana_lab.systems.ema import Average
from sana_lab.types import Batch, Json


class AttributesSystem(System):
    """Training of `networks.Attributes` on `data: shapes` at 64 px, with the loss `attribute_loss`."""

    def __init__(
        self,
        widths: Widths = (16, 48, 96),  # channels of each stage of stride 2
        optimizer: Annotated[Spec, "optimizer"] = "adamw",  # over all parameters
        warmup: Steps = 100,  # steps of linear warm-up of the learning rate
        decay: Share = 0.5,  # final fraction of training over which the learning rate decays to 0
        ema: Decay = 0.998,  # decay of the moving average of weights, per step
    ) -> None:
        super().__init__()
        self.network = Attributes(widths)
        self.average = Average(self, ema)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        rows = training_scenes(self.trainer, batch)
        cells, counts = self.network(images_of(batch).contiguous(memory_format=torch.channels_last))
        loss = attribute_loss(cells, counts, rows)
        self.log("train/loss", loss.detach(), batch_size=len(batch.prompts), sync_dist=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        truth = class_counts(validation_scenes(self.trainer, batch, batch_idx))
        with self.averaged():
            outcomes = count_outcomes(count(self.network, images_of(batch)).cpu(), truth)
        for name, values in outcomes.items():
            self.log(f"val/{name}", values.mean(), batch_size=len(truth), sync_dist=True)

    def evaluate(self, evaluator: Evaluator) -> Config:
        """Accuracies on held-out scenes."""
        return evaluator.reported({"held_out": held_out(self, evaluator.options["held_out"])})


def attribute_loss(cells: Tensor, counts: Tensor, rows: Scenes) -> Tensor:
    """Cross-entropy of the cells' classes, logits (B, N, K + 1), times 10, plus that of counts, logits (B, K, 5).

    Cells are averaged, counts summed over classes. With the loss over cells, shapes are learned ten times faster than
    from counts only.
    """
    cell_targets = cell_classes(rows, round(cells.shape[1] ** 0.5)).to(cells.device)
    count_targets = class_counts(rows).to(cells.device)
    counting = F.cross_entropy(counts.flatten(0, 1), count_targets.flatten(), reduction="sum") / len(count_targets)
    return 10 * F.cross_entropy(cells.flatten(0, 1), cell_targets.flatten()) + counting


def count_outcomes(predicted: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Metric -> 1 or 0 for each image (B,), from counts (B, K).

    `scene_accuracy`: the counts of all classes are right; `number_accuracy`: the number of objects; `shape_accuracy`:
    the number of each shape; `color_accuracy`: the number of each colour.
    """
    predicted, truth = (x.unflatten(1, (len(SHAPES), len(COLORS))) for x in (predicted, truth))
    equal = {
        "scene_accuracy": predicted == truth,
        "number_accuracy": predicted.sum((1, 2)) == truth.sum((1, 2)),
        "shape_accuracy": predicted.sum(2) == truth.sum(2),
        "color_accuracy": predicted.sum(1) == truth.sum(1),
    }
    return {name: same.reshape(len(truth), -1).all(1).float() for name, same in equal.items()}


def held_out(system: AttributesSystem, n: int = 1000, batch: int = 100) -> Report:
    """Metrics of `count_outcomes` on the first n held-out scenes, with 95 % intervals over scenes. SpecError."""
    data = held_out_data(system, n)
    outcomes: dict[str, list[float]] = {}
    for first in range(0, n, batch):
        indices = range(first, min(first + batch, n))
        scenes = data.batch_at(indices, "val")
        truth = class_counts(held_out_scenes(indices, scenes))
        for name, values in count_outcomes(count(system.network, images_of(scenes)), truth).items():
            outcomes.setdefault(name, []).extend(values.tolist())
    return outcomes_report(outcomes, {"scenes": "held-out", "n": n})


# --- shared with train_clip -----------------------------------------------------------------------------------------


def images_of(batch: Batch) -> Tensor:
    """The batch's images (B, 3, 64, 64). ValueError for others."""
    if batch.images is None or batch.images.shape[1:] != (3, SIDE, SIDE):
        shape = None if batch.images is None else tuple(batch.images.shape)
        raise ValueError(f"the embedded world's networks take images of {SIDE} px; given {shape}")
    return batch.images


def held_out_data(system: System, n: int) -> DataModule:
    """The data module of a system's experiment with n held-out scenes. SpecError without an experiment."""
    if system.experiment is None:
        raise SpecError("the system has no experiment, which says what it was trained on; expected what `load` makes")
    return specs.build("data", {**system.experiment["data"], "held_out": n})


def outcomes_report(outcomes: Mapping[str, list[float]], settings: Json) -> Report:
    """Means of outcomes (0 or 1 per scene) with Wilson's intervals, which have nonzero width at 0 and 1."""
    return Report({name: wilson(values) for name, values in outcomes.items()}, settings, outcomes)
