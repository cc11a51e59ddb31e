"""`system: clip`: training of the embedded world's small CLIP, the scorer of `clip_shapes`."""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sana_lab.config.ranges import Decay, Depth, Nonnegative, Number, Seed, Share, Steps, Tokens, Width
from sana_lab.config.schema import Config
from sana_lab.config.specs import Spec, SpecError
from sana_lab.evaluation import Report
from sana_lab.shapes.labels import held_out_scenes, training_scenes, validation_scenes
from sana_lab.shapes.networks import CLASSES, Clip
from sana_lab.shapes.scenes import MAX_OBJECTS, Scenes, scene
from sana_lab.shapes.train_attributes import attribute_loss, held_out_data, images_of, outcomes_report
from sana_lab.shapes.wrong_captions import meaning, one_word_off, truths
from sana_lab.systems import Evaluator, System
from sana_lab.systems.ema import Average
from sana_lab.types import Batch


class ClipSystem(System):
    """Training of `networks.Clip` on `data: shapes` at 64 px.

    The loss is CLIP's (arXiv 2103.00020, figure 3): the mean of two cross-entropies over the batch, from images to
    captions and from captions to images. Hard negatives are captions that differ from one of the batch by one word.
    Captions that are true of another image are masked for that image. An auxiliary `attribute_loss` of two linear heads
    on the image tower, used only in training, is added because shapes are learned slowly from captions only.
    """

    auxiliary = ("cells", "counts")
    divisible = False  # each image is compared with the captions of all others

    def __init__(
        self,
        width: Width = 64,  # hidden size of both towers
        layers: Depth = 4,  # transformer blocks of the image tower
        text_layers: Depth = 2,  # transformer blocks of the text tower
        heads: Width = 4,  # attention heads of both towers
        patch: Width = 8,  # pixels a side of the image tower's patches; divides 64
        dim: Width = 64,  # number of features
        max_tokens: Tokens = 32,  # length to which prompts are truncated
        negatives: Number = 2,  # wrong captions per caption of the batch, from 0
        attributes: Nonnegative = 1.0,  # weight of the attribute loss
        optimizer: Annotated[Spec, "optimizer"] = "adamw",  # over all parameters
        warmup: Steps = 100,  # steps of linear warm-up of the learning rate
        decay: Share = 0.5,  # final fraction of training over which the learning rate decays to 0
        ema: Decay = 0.998,  # decay of the moving average of weights, per step
        seed: Seed = 0,  # seed of the wrong captions
    ) -> None:
        super().__init__()
        if negatives < 0:
            raise SpecError(f"negatives is {negatives}, expected 0 or more")
        self.network = Clip(width, layers, text_layers, heads, patch, dim, max_tokens)
        self.cells = nn.Linear(width, CLASSES + 1)
        self.counts = nn.Linear(width, CLASSES * (MAX_OBJECTS + 1))
        self.average = Average(self, ema)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        rows = training_scenes(self.trainer, batch)
        key = (self.settings.seed, self.trainer.fit_loop.epoch_loop.total_batch_idx, self.global_rank)
        wrong = wrong_captions(batch.prompts, self.settings.negatives, np.random.default_rng(key))
        prompts = [*batch.prompts, *wrong]
        masked = also_true(rows, prompts).to(self.device)
        states = self.network.image_states(images_of(batch))
        cosines = self.network.project(states.pooler_output) @ self.network.text_features(prompts).T
        counts = self.counts(states.pooler_output).unflatten(1, (CLASSES, MAX_OBJECTS + 1))
        attributes = attribute_loss(self.cells(states.last_hidden_state[:, 1:]), counts, rows)
        contrastive = contrastive_loss(self.network.scale * cosines, masked)
        loss = contrastive + self.settings.attributes * attributes
        self.log("train/contrastive", contrastive.detach())
        self.log("train/loss", loss.detach(), batch_size=len(masked))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        rows = validation_scenes(self.trainer, batch, batch_idx)
        with self.averaged():
            outcomes = {
                "retrieval": retrieval_outcomes(self.network, batch, rows),
                "one_word": one_word_outcomes(self.network, batch, rows),
            }
        for name, values in outcomes.items():
            self.log(f"val/{name}", float(np.mean(values)), batch_size=len(values), sync_dist=True)

    def evaluate(self, evaluator: Evaluator) -> Config:
        """Retrieval and one-word accuracy on held-out scenes."""
        return evaluator.reported({"held_out": held_out(self, evaluator.options["held_out"])})


def contrastive_loss(logits: Tensor, masked: Tensor) -> Tensor:
    """CLIP's loss of logits (B, T), whose first B columns are the rows' own captions; `masked` (B, T) are ignored."""
    logits = logits.masked_fill(masked, -torch.inf)
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits[:, : len(logits)].T, own)) / 2


def wrong_captions(prompts: Sequence[str], n: int, random: np.random.Generator) -> list[str]:
    """n captions per prompt that differ from it by one word; each kind of word is equally likely."""
    captions = []
    for prompt in prompts:
        by_kind = list(one_word_off(prompt).values())
        picks = [by_kind[i] for i in random.integers(len(by_kind), size=n)] if by_kind else [[prompt]] * n
        captions += [texts[random.integers(len(texts))] for texts in picks]
    return captions


def also_true(rows: Scenes, prompts: Sequence[str]) -> Tensor:
    """(B, T) bool: prompt t is true of scene b but is not its own caption (t = b)."""
    meanings = [meaning(prompt) for prompt in prompts]
    scene_truths = [truths(scene(rows, i)) for i in range(len(rows.count))]
    true = torch.tensor([[m in truth for m in meanings] for truth in scene_truths])
    return true & ~torch.eye(*true.shape, dtype=torch.bool)


@torch.no_grad()
def retrieval_outcomes(network: Clip, batch: Batch, rows: Scenes) -> list[float]:
    """1 for each image whose caption is closer than all false captions in the batch, else 0."""
    cosines = network.image_features(images_of(batch)) @ network.text_features(batch.prompts).T
    cosines = cosines.cpu().masked_fill(also_true(rows, batch.prompts), -torch.inf)
    return (cosines.argmax(1) == torch.arange(len(cosines))).float().tolist()


@torch.no_grad()
def one_word_outcomes(network: Clip, batch: Batch, rows: Scenes) -> list[float]:
    """1 for each image whose caption is closer than every false caption that differs by one word, else 0."""
    return [float(min(gaps, default=1) > 0) for gaps in margins(network, batch, rows)]


@torch.no_grad()
def margins(network: Clip, batch: Batch, rows: Scenes, kind: str | None = None) -> list[list[float]]:
    """Per image, the cosine to its caption minus that to each false caption differing by one word (of `kind`)."""
    wrong = [_wrong(prompt, truths(scene(rows, i)), kind) for i, prompt in enumerate(batch.prompts)]
    images, own = network.image_features(images_of(batch)), network.text_features(batch.prompts)
    others = network.text_features([text for texts in wrong for text in texts]).split([len(texts) for texts in wrong])
    return [((o - t) @ image).tolist() for image, o, t in zip(images, own, others, strict=True)]


def _wrong(prompt: str, true: set[tuple[str, ...]], kind: str | None) -> list[str]:
    by_kind = one_word_off(prompt)
    return [text for k, texts in by_kind.items() if kind in (None, k) for text in texts if meaning(text) not in true]


def held_out(system: ClipSystem, n: int = 1000, rivals: int = 64) -> Report:
    """Accuracies on the first n held-out scenes, with 95 % intervals over scenes. SpecError without an experiment.

    `retrieval`: the share of images closer to their caption than to all false captions of the `rivals` - 1 neighbouring
    scenes; `one_word`: closer than to every false caption that differs by one word.
    """
    data = held_out_data(system, n)
    outcomes: dict[str, list[float]] = {"retrieval": [], "one_word": []}
    for first in range(0, n, rivals):
        indices = range(first, min(first + rivals, n))
        batch_indices = range(max(0, indices[-1] + 1 - rivals), indices[-1] + 1)  # the last ones have as many rivals
        batch = data.batch_at(batch_indices, "val")
        rows = held_out_scenes(batch_indices, batch)
        outcomes["retrieval"] += retrieval_outcomes(system.network, batch, rows)[-len(indices) :]
        outcomes["one_word"] += one_word_outcomes(system.network, batch, rows)[-len(indices) :]
    return outcomes_report(outcomes, {"scenes": "held-out", "n": n, "rivals": rivals})
