"""The LightningModule that trains the embedded world's small CLIP, which `clip_shapes` scores with."""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sana_lab.config.specs import Spec, SpecError
from sana_lab.evaluation import Report
from sana_lab.shapes.labels import held_out_scenes, training_scenes, validation_scenes
from sana_lab.shapes.networks import CLASSES, Clip
from sana_lab.shapes.scenes import MAX_OBJECTS, Scenes, scene
from sana_lab.shapes.train_attributes import attribute_loss, intervals, pictures, world_of
from sana_lab.shapes.wrong_captions import meaning, one_word_off, truths
from sana_lab.systems import System
from sana_lab.systems.ema import Average
from sana_lab.types import Batch


class ClipSystem(System):
    """Learns which caption belongs to which picture (`data: shapes`, 64 px).

    The loss is CLIP's (arXiv 2103.00020, figure 3), the mean of two cross-entropies over the batch: each picture picks
    its caption, each caption its picture. A picture also has to tell its caption from `negatives` wrong ones for each
    caption of the batch, which differ from it by one word. What is true of a picture without being its own caption is
    left out of its choices, and so are pictures of which a caption is as true as of its own. `attributes` times
    `attribute_loss` is added, of two linear maps from the picture tower that serve in training alone: captions by
    themselves teach forms slowly.
    """

    auxiliary = ("cells", "counts")

    def __init__(
        self,
        width: int = 64,
        layers: int = 4,
        text_layers: int = 2,
        heads: int = 4,
        patch: int = 8,
        dim: int = 64,
        max_tokens: int = 32,
        negatives: int = 2,
        attributes: float = 1.0,
        optimizer: Annotated[Spec, "optimizer"] = "adamw",
        warmup: int = 100,
        decay: float = 0.5,
        ema: float = 0.998,
        seed: int = 0,
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
        spare = also_true(rows, prompts).to(self.device)
        states = self.network.image_states(pictures(batch))
        cosines = self.network.project(states.pooler_output) @ self.network.text_features(prompts).T
        counts = self.counts(states.pooler_output).unflatten(1, (CLASSES, MAX_OBJECTS + 1))
        learned = attribute_loss(self.cells(states.last_hidden_state[:, 1:]), counts, rows)
        matched = contrastive(self.network.scale * cosines, spare)
        loss = matched + self.settings.attributes * learned
        self.log("train/contrastive", matched.detach())
        self.log("train/loss", loss.detach(), batch_size=len(spare))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        rows = validation_scenes(self.trainer, batch, batch_idx)
        with self.averaged():
            right = {"retrieval": retrieved(self.network, batch, rows), "one_word": told(self.network, batch, rows)}
        for name, values in right.items():
            self.log(f"val/{name}", float(np.mean(values)), batch_size=len(values), sync_dist=True)


def contrastive(logits: Tensor, spare: Tensor) -> Tensor:
    """CLIP's loss of logits (B, T), whose first B columns belong to the rows; `spare` (B, T) are no choices."""
    logits = logits.masked_fill(spare, -torch.inf)
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits[:, : len(logits)].T, own)) / 2


def wrong_captions(prompts: Sequence[str], each: int, random: np.random.Generator) -> list[str]:
    """`each` captions for every prompt that differ from it by one word, every kind of word as often as another."""
    found = []
    for prompt in prompts:
        off = list(one_word_off(prompt).values())
        picks = [off[i] for i in random.integers(len(off), size=each)] if off else [[prompt]] * each
        found += [texts[random.integers(len(texts))] for texts in picks]
    return found


def also_true(rows: Scenes, prompts: Sequence[str]) -> Tensor:
    """(B, T) bool: prompt t is true of scene b, but is not the caption of its own place."""
    said = [meaning(prompt) for prompt in prompts]
    known = [truths(scene(rows, i)) for i in range(len(rows.count))]
    true = torch.tensor([[m in truth for m in said] for truth in known])
    return true & ~torch.eye(*true.shape, dtype=torch.bool)


@torch.no_grad()
def retrieved(network: Clip, batch: Batch, rows: Scenes) -> list[float]:
    """For each picture 1 where its caption is closest of all in the batch that are wrong of it, and its own; else 0."""
    cosines = network.image_features(pictures(batch)) @ network.text_features(batch.prompts).T
    cosines = cosines.cpu().masked_fill(also_true(rows, batch.prompts), -torch.inf)
    return (cosines.argmax(1) == torch.arange(len(cosines))).float().tolist()


@torch.no_grad()
def told(network: Clip, batch: Batch, rows: Scenes) -> list[float]:
    """For each picture 1 where its caption is closer than every wrong one that differs from it by one word; else 0."""
    return [float(min(gaps, default=1) > 0) for gaps in margins(network, batch, rows)]


@torch.no_grad()
def margins(network: Clip, batch: Batch, rows: Scenes, kind: str | None = None) -> list[list[float]]:
    """For each picture, by how much the cosine to its caption exceeds that to each wrong one, of a kind or of all."""
    off = [_wrong(prompt, truths(scene(rows, i)), kind) for i, prompt in enumerate(batch.prompts)]
    ours, own = network.image_features(pictures(batch)), network.text_features(batch.prompts)
    theirs = iter(network.text_features([text for texts in off for text in texts]).split([len(texts) for texts in off]))
    return [((o - t) @ p).tolist() for p, o, t in zip(ours, own, theirs, strict=True)]


def _wrong(prompt: str, true: set[tuple[str, ...]], kind: str | None) -> list[str]:
    off = one_word_off(prompt)
    return [text for k, texts in off.items() if kind in (None, k) for text in texts if meaning(text) not in true]


def held_out(system: ClipSystem, n: int = 1000, rivals: int = 64) -> Report:
    """How well captions are told apart on the first n held-out scenes, with 95 % intervals over scenes.

    `retrieval`: the share of pictures that are closer to their caption than to all those of the `rivals` - 1 scenes
    beside them that are wrong of them; `one_word`: than to every caption that differs from theirs by one word and is
    wrong. SpecError where the system has no experiment.
    """
    data = world_of(system, n)
    found: dict[str, list[float]] = {"retrieval": [], "one_word": []}
    for first in range(0, n, rivals):
        indices = range(first, min(first + rivals, n))
        beside = range(max(0, indices[-1] + 1 - rivals), indices[-1] + 1)  # the last ones have as many rivals
        shown = data.batch_at(beside, "val")
        rows = held_out_scenes(beside, shown)
        found["retrieval"] += retrieved(system.network, shown, rows)[-len(indices) :]
        found["one_word"] += told(system.network, shown, rows)[-len(indices) :]
    return Report(intervals(found), {"scenes": "held-out", "n": n, "rivals": rivals}, found)
