"""Interface of the text encoders: prompts to token features."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from sana_lab.models.layers import queued
from sana_lab.types import Text

Null = Literal["diffusers", "nvlabs"]
"""What the unconditional half of guidance may look at. Both encode the negative prompt, or "", without instruction.

`diffusers` masks it as any text: of "", one token is seen. `nvlabs` lays the prompt's own mask over it, in training and
sampling: as many positions are seen as the prompt has, padding among them, whose features the encoder gives as well.
"""


class PromptCut(UserWarning):
    """A prompt is longer than its encoder reads."""


class TextEncoder(nn.Module, ABC):
    """Prompts -> Text(tokens (B, L, dim), mask (B, L)); the null condition is `forward([""])`.

    A subclass gives `dim` (feature width) and `max_tokens` (the longest L).
    """

    dim: int
    max_tokens: int
    null: Null = "diffusers"
    reports: int = 8  # warnings of cut prompts that are left: a training on long captions shall not drown in them

    @abstractmethod
    def forward(self, prompts: Sequence[str]) -> Text:
        """Features of each prompt, right-padded to the longest of the batch (at most `max_tokens`)."""

    def plain(self, prompts: Sequence[str], length: int = 0) -> Text:
        """Features without an instruction, right-padded to `length` at least; an encoder that can pad overrides it."""
        return self(prompts)

    def forget(self) -> None:
        """Read each prompt anew, also one that was read lately; a measurement asks for it. Here nothing is kept."""

    def against(self, negatives: Sequence[str], text: Text) -> Text:
        """What guidance leads away from, one row for all prompts or one each, as `null` has it masked."""
        if self.null == "diffusers":
            return self.plain(negatives)
        rows, length = text.mask.shape
        tokens = self.plain(negatives, length).tokens[:, :length]
        return Text(tokens.expand(rows, -1, -1), text.mask)

    def dropped(self, prompts: Sequence[str], drop: Sequence[bool]) -> Text:
        """Features for training, those of some rows replaced by the null condition's."""
        if self.null == "diffusers":
            return self(["" if gone else prompt for prompt, gone in zip(prompts, drop, strict=True)])
        text = self(prompts)
        rows = queued(torch.tensor(drop), text.mask.device)[:, None, None]
        return Text(torch.where(rows, self.against([""], text).tokens, text.tokens), text.mask)

    def report(self, cut: Mapping[int, int]) -> None:
        """Warn, once for a batch, how many tokens of which of its prompts were cut."""
        if not cut or not self.reports:
            return
        self.reports -= 1
        named = ", ".join(f"{tokens} of prompt {i}" for i, tokens in [*cut.items()][:5])
        more = f" and of {len(cut) - 5} more" if len(cut) > 5 else ""
        last = "" if self.reports else "; this is not said again"
        said = f"prompts over {self.max_tokens} tokens are cut at their end, by tokens: {named}{more}{last}"
        warnings.warn(said, PromptCut, stacklevel=2)
