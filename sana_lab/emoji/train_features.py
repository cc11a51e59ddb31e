"""`system: emoji_features`: training of the features in which emoji are compared (`fd_emoji`, `emoji_recall`)."""

import math
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sana_lab.config import specs
from sana_lab.config.ranges import Decay, Nonnegative, Positive, Seed, Share, Steps, Width, Widths
from sana_lab.config.schema import Config
from sana_lab.config.specs import Spec, SpecError
from sana_lab.diffusion.sampling import generator
from sana_lab.emoji.data import Emoji
from sana_lab.emoji.drawings import TONES
from sana_lab.emoji.networks import SIDE, Features, features_of
from sana_lab.evaluation import Report
from sana_lab.intervals import wilson
from sana_lab.systems import Evaluator, System
from sana_lab.systems.ema import Average
from sana_lab.types import WHOLE, Batch, Part

SUBGROUPS = 128  # more than Unicode has
IGNORED = -100  # class of drawings without one


class EmojiFeatures(System):
    """Training of `networks.Features` on `data: emoji` at 64 px.

    Each drawing is a class (arXiv 1805.01978, with a trained vector per class): the loss is the cross-entropy of scaled
    cosines between the features of a distorted drawing and the vectors of all drawings, so that those of one concept in
    other tones count as others. Two linear heads, used only in training, learn skin tone and subgroup.
    """

    auxiliary = ("classes", "tones", "subgroups")
    divisible = True

    def __init__(
        self,
        widths: Widths = (24, 48, 96, 128),  # channels of each stage of stride 2
        dim: Width = 96,  # number of features
        drawings: Width = 8192,  # most drawings of the data
        scale: Positive = 16.0,  # factor of cosines before the softmax
        attributes: Nonnegative = 0.5,  # weight of the losses of skin tone and subgroup
        optimizer: Annotated[Spec, "optimizer"] = "adamw",  # over all parameters
        warmup: Steps = 100,  # steps of linear warm-up of the learning rate
        decay: Share = 0.5,  # final fraction of training over which the learning rate decays to 0
        ema: Decay = 0.998,  # decay of the moving average of weights, per step
        seed: Seed = 0,  # seed of the distortions
    ) -> None:
        super().__init__()
        self.network = Features(widths, dim)
        self.classes = nn.Embedding(drawings, dim)
        self.tones = nn.Linear(dim, len(TONES) + 1)
        self.subgroups = nn.Linear(dim, SUBGROUPS)
        self.average = Average(self, ema)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        data, number = _emoji(self.trainer), self.trainer.fit_loop.epoch_loop.total_batch_idx
        part = Part.of_trainer(self._trainer)
        rows = torch.tensor(data.train_rows(number, part))
        random = generator(self.settings.seed, number, 0)
        features = self.network(distorted(_images(batch), random, part))
        loss = self._class_loss(features, rows.to(self.device)) + self.settings.attributes * self._heads(
            features, data, rows
        )
        self.log("train/loss", loss.detach(), batch_size=len(rows), sync_dist=True)
        return loss

    def _class_loss(self, features: Tensor, rows: Tensor) -> Tensor:
        if int(rows.max()) >= len(self.classes.weight):
            raise SpecError(f"drawings is {len(self.classes.weight)}, and the data has drawing {int(rows.max())}")
        cosines = features @ F.normalize(self.classes.weight, dim=-1).T
        return F.cross_entropy(self.settings.scale * cosines, rows)

    def _heads(self, features: Tensor, data: Emoji, rows: Tensor) -> Tensor:
        drawings = [data.content.rows[i] for i in rows.tolist()]
        tones = [(*d.tones, 0)[0] if len(d.tones) < 2 else IGNORED for d in drawings]
        subgroups = [d.subgroup if d.subgroup >= 0 else IGNORED for d in drawings]
        scaled = features * math.sqrt(features.shape[-1])
        pairs = ((self.tones, tones), (self.subgroups, subgroups))
        losses = [_cross_entropy(head(scaled), torch.tensor(classes, device=self.device)) for head, classes in pairs]
        return torch.stack(losses).sum()

    def on_validation_start(self) -> None:
        data = _emoji(self.trainer)
        with self.averaged():
            self._gallery = features_of(self.network, data.pictures(range(len(data.content.rows))).to(self.device))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        data = _emoji(self.trainer)
        first = batch_idx * data.batch
        rows = data.content.val[first : first + len(batch.prompts)]
        with self.averaged():
            outcomes = retrieved(self.network, _images(batch), rows, self._gallery)
        self.log("val/retrieval", sum(outcomes) / len(outcomes), batch_size=len(outcomes), sync_dist=True)

    def evaluate(self, evaluator: Evaluator) -> Config:
        """Retrieval of held-out drawings."""
        return evaluator.reported({"held_out": held_out(self, evaluator.options["held_out"])})


def retrieved(network: Features, images: Tensor, rows: list[int], gallery: Tensor) -> list[float]:
    """1 for each image (B, 3, 64, 64) that, distorted, is nearest to its own row of the gallery (N, D), else 0."""
    with torch.no_grad():
        features = network(distorted(images, generator(0, 0, 0)))
    nearest = (features @ gallery.T).argmax(1).tolist()
    return [float(a == b) for a, b in zip(nearest, rows, strict=True)]


def held_out(system: EmojiFeatures, n: int = 1000) -> Report:
    """`retrieval`: share of the first n held-out drawings that, distorted, are nearest to themselves among all."""
    if system.experiment is None:
        raise SpecError("the system has no experiment, which says what it was trained on; expected what `load` makes")
    data: Any = specs.build("data", system.experiment["data"])
    rows = data.content.val[:n]
    gallery = features_of(system.network, data.pictures(range(len(data.content.rows))))
    images = data.batch_at(range(len(rows)), "val").images
    outcomes = retrieved(system.network, images, rows, gallery)
    settings = {"n": len(rows), "among": len(gallery)}
    return Report({"retrieval": wilson(outcomes)}, settings, {"retrieval": outcomes})


def distorted(images: Tensor, random: torch.Generator, part: Part = WHOLE) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] moved, turned, scaled, blurred, with noise and another contrast: as a generator's.

    Shifts up to 6 % of the side, 8 degrees, 10 % of size and of contrast, noise of deviation up to 0.15.
    """
    n, device = len(images), images.device
    numbers = part.draw(lambda rows: torch.rand(rows, 7, generator=random) * 2 - 1, n).to(device)
    angle, size, x, y, contrast, noise, blur = numbers.unbind(1)
    angle, size = angle * math.radians(8), 1 + 0.1 * size
    cos, sin = angle.cos() * size, angle.sin() * size
    matrix = torch.stack([torch.stack([cos, -sin, 0.12 * x], -1), torch.stack([sin, cos, 0.12 * y], -1)], 1)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    soft = F.avg_pool2d(F.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, 1)
    mixed = torch.where((blur > 0)[:, None, None, None], soft, moved) * (1 + 0.1 * contrast)[:, None, None, None]
    grain = part.draw(lambda rows: torch.randn(rows, *images.shape[1:], generator=random), n).to(device)
    return (mixed + 0.15 * noise.abs()[:, None, None, None] * grain).clamp(-1, 1)


def _cross_entropy(logits: Tensor, classes: Tensor) -> Tensor:
    """The mean over rows that have a class; 0 if none has."""
    total = F.cross_entropy(logits, classes, ignore_index=IGNORED, reduction="sum")
    return total / (classes != IGNORED).sum().clamp(min=1)


def _images(batch: Batch) -> Tensor:
    if batch.images is None or batch.images.shape[1:] != (3, SIDE, SIDE):
        shape = None if batch.images is None else tuple(batch.images.shape)
        raise ValueError(f"emoji's features are of images of {SIDE} px; given {shape}")
    return batch.images


def _emoji(trainer: Any) -> Emoji:
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, Emoji):
        raise ValueError(f"emoji's features are trained on data: emoji; given {type(data).__name__}")
    return data
