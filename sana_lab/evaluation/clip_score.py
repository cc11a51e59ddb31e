"""CLIP score as SANA computes it: 100 x the mean cosine between each image and its prompt, not clamped."""

import re
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, final

import torch
from torch import Tensor

from sana_lab.config.ranges import BatchSize
from sana_lab.config.specs import RUNTIME
from sana_lab.evaluation import Measure, Report
from sana_lab.evaluation.clip_model import PretrainedClip
from sana_lab.evaluation.per_prompt import PromptScores
from sana_lab.types import Json

LongPrompt = Literal["truncate", "chunks"]


@final
class ClipScore(Measure):
    """CLIP score `clip`, with the percentage of truncated prompts `clip_truncated`; or `clip_chunks`, in fp32.

    Truncated prompts keep their end-of-text token, as CLIP needs it. Prompts are the user's, never rewritten ones.
    Hessel et al.'s CLIPScore is another number: 2.5 times the cosine clamped at 0, with "A photo depicts" before each
    caption.
    """

    own_prompts = False

    def __init__(
        self,
        model: str,  # transformers folder of a CLIP; SANA's numbers are of openai/clip-vit-large-patch14
        batch: BatchSize = 64,  # images at a time
        # of prompts that CLIP cannot read whole: their beginning, or the mean cosine over chunks of whole sentences
        long: LongPrompt = "truncate",
        device: Annotated[str, RUNTIME] = "auto",  # auto, cpu, cuda, cuda:1 ...
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch is {batch}, expected at least 1")
        self.clip, self.batch, self.long = PretrainedClip(model, device), batch, long
        self.scores = PromptScores()
        self.chunks: dict[str, list[str]] = {}  # prompt -> the texts that CLIP reads

    def add(self, images: Tensor, rows: Sequence[Json]) -> None:
        self.collect(self.extract(images, rows), rows)

    def extract(self, images: Tensor, rows: Sequence[Json]) -> list[float]:
        prompts = [row["prompt"] for row in rows]
        parts = [slice(first, first + self.batch) for first in range(0, len(prompts), self.batch)]
        return [score for part in parts for score in self._scores(images[part], prompts[part])]

    def collect(self, extracted: list[float], rows: Sequence[Json]) -> None:
        prompts = [row["prompt"] for row in rows]
        for prompt in prompts:
            self._chunks(prompt)  # of the images of other processes, to count them
        self.scores.add(prompts, extracted)

    def report(self) -> Report:
        score = self.scores.mean()
        settings = {
            "long": self.long,
            "formula": "100 x mean cosine, no clamp",
            **self.clip.identity(),
            **self.scores.counts(),
        }
        if self.long == "chunks":
            mean_chunks = sum(map(len, self.chunks.values())) / len(self.chunks)
            values, settings = {"clip_chunks": score}, {**settings, "chunks_per_prompt": mean_chunks}
        else:
            truncated = self.scores.truncated_percent()
            values = {"clip": score, "clip_truncated": truncated}
            settings = {**settings, "truncated_percent": truncated.value}
        return Report(values, settings, {next(iter(values)): list(self.scores.values)})

    def _scores(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
        """100 x cosine per image, the mean over the chunks of its prompt."""
        image_features = self.clip.image_features(list(images))
        groups = [self._chunks(prompt) for prompt in prompts]
        text_features = self._text_features([chunk for group in groups for chunk in group])
        owner = torch.tensor([i for i, group in enumerate(groups) for _ in group])
        cosines = (image_features[owner.to(image_features.device)] * text_features).sum(-1).double().cpu()
        sums = torch.zeros(len(prompts), dtype=torch.float64).index_add(0, owner, cosines)
        return (100 * sums / torch.tensor([len(group) for group in groups])).tolist()

    def _chunks(self, prompt: str) -> list[str]:
        if prompt not in self.chunks:
            self.scores.truncated[prompt] = self.clip.is_truncated(prompt)
            whole = self.long == "truncate" or not self.scores.truncated[prompt]
            self.chunks[prompt] = [prompt] if whole else split(prompt, lambda text: not self.clip.is_truncated(text))
        return self.chunks[prompt]

    def _text_features(self, texts: Sequence[str]) -> Tensor:
        """(N, D) of any number of texts; each distinct one is encoded once."""
        distinct = list(dict.fromkeys(texts))
        groups = [distinct[i : i + self.batch] for i in range(0, len(distinct), self.batch)]
        features = torch.cat([self.clip.text_features(group) for group in groups])
        return features[[distinct.index(text) for text in texts]]


def split(text: str, fits: Callable[[str], bool]) -> list[str]:
    """The text in as few chunks as possible, in order, that fit: whole sentences, or words of a longer sentence."""
    sentences = re.split(r"(?<=[.!?;])\s+", text.strip())
    chunks: list[str] = []
    for piece in (p for s in sentences for p in ([s] if fits(s) else s.split())):
        joined = f"{chunks[-1]} {piece}" if chunks else piece
        chunks = [*chunks[:-1], joined] if chunks and fits(joined) else [*chunks, piece]
    return chunks
