"""Interface of the text encoders: prompts to token features.

Legend: B prompts, L tokens, D feature width.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from sana_lab.ops.transfer import to_device
from sana_lab.types import Text

Null = Literal["diffusers", "nvlabs"]
"""Attention mask of the unconditional half of guidance; both encode the negative prompt ("") without instruction.

`diffusers` uses the negative prompt's own mask: one token for "". `nvlabs` uses the prompt's mask, in training and in
sampling, so that cross-attention sees as many positions as the prompt has, padding features included.
"""

WARNINGS = 8  # truncation warnings per encoder, so that training on long captions does not flood the log


class PromptTruncated(UserWarning):
    """A prompt has more tokens than its encoder reads."""


class TextEncoder(nn.Module, ABC):
    """Prompts -> Text(tokens (B, L, D), mask (B, L) bool, True at real tokens).

    A subclass implements `forward` and sets in its constructor: `dim` (D), `max_tokens` (the largest L), `pretrained`
    if its weights are pretrained, and `null` if it supports both conventions. It overrides `without_instruction` if it
    prepends an instruction to prompts or supports `null` "nvlabs", and `clear_cache` if it caches features. The null
    condition is the encoding of "". One that holds another encoder frozen names it in `frozen`.
    """

    dim: int
    max_tokens: int
    pretrained: bool = False  # pretrained encoders are frozen, others train with the DiT
    null: Null = "diffusers"
    frozen: tuple[str, ...] = ()  # child modules that never train: in no weights file, their specs rebuild them
    prompts: Sequence[str] | None = None  # the only prompts it reads, such as classes; None is any text
    warnings_left: int = WARNINGS

    @abstractmethod
    def forward(self, prompts: Sequence[str]) -> Text:
        """Features of each prompt, right-padded to the longest of the batch; L is at most `max_tokens`."""

    def without_instruction(self, prompts: Sequence[str], length: int = 0) -> Text:
        """Features of prompts without instruction, right-padded to at least `length` tokens, with padding features."""
        return self(prompts)

    def clear_cache(self) -> None:
        """Discard cached features of prompts, so that the next call encodes them again (for timing)."""

    def negative(self, negatives: Sequence[str], text: Text) -> Text:
        """Features of the unconditional half of guidance for `text`: one negative prompt for all rows, or one per row.

        Tokens (1 or B, L', D); the mask follows the convention `null`.
        """
        if self.null == "diffusers":
            return self.without_instruction(negatives)
        rows, length = text.mask.shape
        tokens = self.without_instruction(negatives, length).tokens[:, :length]
        return Text(tokens.expand(rows, -1, -1), text.mask)

    def with_dropout(self, prompts: Sequence[str], drop: Sequence[bool]) -> Text:
        """Features for training; rows where `drop` is True get the null condition (classifier-free guidance)."""
        if self.null == "diffusers":
            return self(["" if dropped else prompt for prompt, dropped in zip(prompts, drop, strict=True)])
        text = self(prompts)
        rows = to_device(torch.tensor(drop), text.mask.device)[:, None, None]
        return Text(torch.where(rows, self.negative([""], text).tokens, text.tokens), text.mask)

    def warn_truncated(self, removed: Mapping[int, int]) -> None:
        """Emit one warning per batch; `removed` maps the index of a truncated prompt to its number of lost tokens."""
        if not removed or not self.warnings_left:
            return
        self.warnings_left -= 1
        listed = ", ".join(f"{tokens} of prompt {i}" for i, tokens in [*removed.items()][:5])
        more = f" and of {len(removed) - 5} more" if len(removed) > 5 else ""
        last = "" if self.warnings_left else "; further truncations are not reported"
        message = f"prompts over {self.max_tokens} tokens are truncated at the end, tokens removed: {listed}{more}"
        warnings.warn(message + last, PromptTruncated, stacklevel=2)
