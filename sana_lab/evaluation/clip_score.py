"""CLIP score as SANA computes it: 100 x the mean cosine between each picture and its prompt, without a clamp."""

import re
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, final

import torch
from torch import Tensor

from sana_lab.config.specs import RUNTIME
from sana_lab.evaluation import Measure, Report
from sana_lab.evaluation.clip_model import PretrainedClip
from sana_lab.evaluation.per_prompt import Scored
from sana_lab.types import Json

LongText = Literal["truncate", "chunks"]
"""Of a prompt that CLIP cannot read whole: its beginning, or the mean over chunks of whole sentences."""


@final
class ClipScore(Measure):
    """`clip`, with `clip_truncated`, the percent of prompts that were cut; or `clip_chunks`, which cuts none.

    `model` is a transformers folder; SANA's numbers are of openai/clip-vit-large-patch14. Everything is in fp32, and a
    cut prompt keeps its end-of-text, as CLIP needs it. Prompts are those of the user, never rewritten ones. Chunks are
    as many whole sentences as CLIP reads, of a longer sentence as many words. Hessel et al.'s CLIPScore is another
    number: 2.5 times the cosine clamped at 0, with "A photo depicts" before each caption.
    """

    def __init__(
        self,
        model: str,
        batch: int = 64,
        long: LongText = "truncate",
        device: Annotated[str, RUNTIME] = "auto",
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch is {batch}, expected at least 1")
        self.clip, self.batch, self.long = PretrainedClip(model, device), batch, long
        self.scored = Scored()
        self.pieces: dict[str, list[str]] = {}  # prompt -> what CLIP reads of it

    def add(self, images: Tensor, rows: Sequence[Json]) -> None:
        prompts = [row["prompt"] for row in rows]
        for first in range(0, len(prompts), self.batch):
            part = prompts[first : first + self.batch]
            self.scored.add(part, self._scores(images[first : first + self.batch], part))

    def report(self) -> Report:
        score, prompts = self.scored.mean(), self.scored.counts()
        settings = {
            "long": self.long,
            "formula": "100 x mean cosine, no clamp",
            **self.clip.identity(),
            **prompts,
        }
        if self.long == "chunks":
            chunks = sum(map(len, self.pieces.values())) / len(self.pieces)
            values, settings = {"clip_chunks": score}, {**settings, "chunks_per_prompt": chunks}
        else:
            cut = self.scored.share_cut()
            values, settings = {"clip": score, "clip_truncated": cut}, {**settings, "truncated_percent": cut.value}
        return Report(values, settings, {next(iter(values)): list(self.scored.values)})

    def _scores(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
        """100 x cosine of each picture, the mean over the pieces of its prompt."""
        pictures = self.clip.pictures(list(images))
        pieces = [self._pieces(prompt) for prompt in prompts]
        texts = self._directions([piece for group in pieces for piece in group])
        owner = torch.tensor([i for i, group in enumerate(pieces) for _ in group])
        cosines = (pictures[owner.to(pictures.device)] * texts).sum(-1).double().cpu()
        sums = torch.zeros(len(prompts), dtype=torch.float64).index_add(0, owner, cosines)
        return (100 * sums / torch.tensor([len(group) for group in pieces])).tolist()

    def _pieces(self, prompt: str) -> list[str]:
        if prompt not in self.pieces:
            self.scored.cut[prompt] = self.clip.is_cut(prompt)
            whole = self.long == "truncate" or not self.scored.cut[prompt]
            self.pieces[prompt] = [prompt] if whole else chunks(prompt, lambda text: not self.clip.is_cut(text))
        return self.pieces[prompt]

    def _directions(self, texts: Sequence[str]) -> Tensor:
        """(N, D) of any number of texts, each distinct one read once."""
        distinct = list(dict.fromkeys(texts))
        groups = [distinct[i : i + self.batch] for i in range(0, len(distinct), self.batch)]
        directions = torch.cat([self.clip.texts(group) for group in groups])
        return directions[[distinct.index(text) for text in texts]]


def chunks(text: str, fits: Callable[[str], bool]) -> list[str]:
    """The text in the fewest pieces in order that fit, broken between sentences, or between words of a long one."""
    sentences = re.split(r"(?<=[.!?;])\s+", text.strip())
    made: list[str] = []
    for piece in (p for s in sentences for p in ([s] if fits(s) else s.split())):
        joined = f"{made[-1]} {piece}" if made else piece
        made = [*made[:-1], joined] if made and fits(joined) else [*made, piece]
    return made
