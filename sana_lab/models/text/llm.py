"""Decoder-only language models as text encoders, with a complex human instruction in front (SANA, section 2.3)."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Annotated, Any, final

import torch
from torch import Tensor
from transformers import AutoModel, GemmaConfig, GemmaModel

from sana_lab.config.specs import RUNTIME, AsBefore, SpecError
from sana_lab.models.layers import queued
from sana_lab.models.text import Null, TextEncoder
from sana_lab.models.text.attention_masks import attention_mask
from sana_lab.models.text.instruction import read_instruction
from sana_lab.models.text.loading import T5_FAMILY, Dtype, load_network, load_tokenizer, read_config, tiny_dtype
from sana_lab.models.text.prefix_cache import Memory, Row, Shelf
from sana_lab.models.text.tokenizer import check_prompts, offline_tokenizer, padded, padding, token_rows, tokens_cut
from sana_lab.types import Text


@final
class Llm(TextEncoder):
    """A pretrained decoder (`model`: folder or hub id of Gemma, Qwen, Llama ...), or without one a tiny Gemma to train.

    Features are the last hidden states, after the final norm, in the network's own dtype. `instruction` is put before
    each prompt but the empty one, which is the null condition; the model reads it and answers nothing. As in SANA's
    released code, BOS and the last `max_tokens` - 1 of the (instruction + max_tokens - 2) positions are kept, so that
    the kept window begins at the instruction's last token. It is `sana_lab`, `released`, `file:PATH` or a text
    (`instruction.read_instruction`). `lowercase` also strips: diffusers does so with each prompt, NVlabs does not.
    `pretrained` says whether `model` was given, and `variant` which of its files are read, such as fp16; `drawn` takes
    its shape alone, with random weights and the offline tokenizer, for speed. `width`, `layers`, `heads` are the tiny
    one's.

    With `cache` a frozen network reads the instruction once, and a prompt that it has read lately not again: the same
    features, up to rounding, in less work. Where padding is, there are then zeros.
    """

    def __init__(
        self,
        model: str | None = None,
        max_tokens: int = 300,
        instruction: str | None = None,
        dtype: Dtype = "auto",
        width: int = 64,
        layers: int = 2,
        heads: int = 2,
        pad_to_max: Annotated[bool, RUNTIME] = False,
        null: Annotated[Null, AsBefore("diffusers")] = "diffusers",
        lowercase: Annotated[bool, AsBefore(False)] = False,
        variant: Annotated[str | None, AsBefore(None)] = None,
        drawn: Annotated[bool, AsBefore(False)] = False,
        cache: Annotated[bool, RUNTIME] = True,
    ) -> None:
        super().__init__()
        if max_tokens < 2:
            raise SpecError(f"max_tokens is {max_tokens}, expected at least 2: a beginning and a word")
        self.pretrained, self.max_tokens, self.pad_to_max = model is not None, max_tokens, pad_to_max
        if model is None:
            self.tokenizer = offline_tokenizer(start=True)
            self.network = _tiny(width, layers, heads, len(self.tokenizer), dtype)
        else:
            self.network, self.tokenizer = _pretrained(model, dtype, variant, drawn), load_tokenizer(model, drawn)
        self.train(not self.pretrained)
        self.dim = self.network.config.hidden_size
        self.null, self.lowercase = null, lowercase
        self.memory = Memory() if cache else None
        self.asked = instruction
        if instruction != "released":  # that is read with the first prompt: a system loads without diffusers
            read_instruction(instruction)

    @cached_property
    def instruction(self) -> str:
        """What is put before each prompt."""
        return read_instruction(self.asked)

    @cached_property
    def first(self) -> int:
        """The first kept position after BOS."""
        return max(1, len(self._ids(self.instruction)) - 1)

    def forward(self, prompts: Sequence[str]) -> Text:
        texts = [self.instruction + prompt if prompt else "" for prompt in self._checked(prompts)]
        return self._encoded(texts, self.first)

    def plain(self, prompts: Sequence[str], length: int = 0) -> Text:
        return self._encoded(self._checked(prompts), 1, length)

    def forget(self) -> None:
        if self.memory is not None:
            self.memory.forget("prompt")

    def _checked(self, prompts: Sequence[str]) -> list[str]:
        checked = check_prompts(prompts)
        return [prompt.lower().strip() for prompt in checked] if self.lowercase else checked

    def _encoded(self, texts: list[str], first: int, length: int = 0) -> Text:
        """Features of BOS and of what follows position `first`, at most `max_tokens` together."""
        room = first + self.max_tokens - 1
        rows = token_rows(self.tokenizer, texts, room)
        self.report(tokens_cut(self.tokenizer, texts, rows, room))
        least = room if self.pad_to_max else length
        if self.memory is None or not self.memory.serves(self.network):
            return self._read(rows, first, least)
        shelf: Shelf = "whole" if length else "prompt" if first > 1 else "plain"
        features = self._recalled(self.memory, shelf, [tuple(row) for row in rows], first)
        return _stacked(features, [_real(row, first) for row in rows], 1 + least - first)

    def _read(self, rows: Sequence[Sequence[int]], first: int, least: int = 0) -> Text:
        ids, mask = padded(rows, padding(self.tokenizer), least)
        ids, there = queued(ids, self.network.device), queued(mask, self.network.device)
        seen = attention_mask(self.network, mask, there)
        hidden = self.network(input_ids=ids, attention_mask=seen, use_cache=False).last_hidden_state
        return Text(*(torch.cat([x[:, :1], x[:, first:]], 1) for x in (hidden, there)))

    def _recalled(self, memory: Memory, shelf: Shelf, rows: list[Row], first: int) -> list[Tensor]:
        """Each row's features, of padding too on the shelf `whole`, where they are as many as there can be."""
        if shelf == "whole":
            return memory.recall(shelf, rows, lambda new: self._read(new, first, self.max_tokens).tokens.clone())
        return memory.recall(shelf, rows, lambda new: self._new(memory, new, first))

    def _new(self, memory: Memory, rows: list[Row], first: int) -> Iterator[Tensor]:
        """The real tokens' features of rows that were not read before, after the instruction where they begin so."""
        begun = memory.begun(self.network, self._ids(self.instruction)[:first])
        behind = [] if begun is None else [row for row in rows if 2 * begun.shared(row) >= len(begun.ids)]
        found: dict[Row, Tensor] = {}
        if begun is not None and behind:
            n, hidden = begun.after(self.network, behind, padding(self.tokenizer))
            for row, features in zip(behind, hidden[:, first - n :], strict=True):
                found[row] = torch.cat([begun.first[0], features[: _real(row, first) - 1]])
        if others := [row for row in rows if row not in found]:
            tokens = self._read(others, first).tokens
            found |= {row: features[: _real(row, first)].clone() for row, features in zip(others, tokens, strict=True)}
        return iter([found[row] for row in rows])

    def _ids(self, text: str) -> Row:
        return tuple(self.tokenizer([text])["input_ids"][0])


def _real(row: Sequence[int], first: int) -> int:
    """How many positions of a row are kept and are no padding: one at least, as `padded` has it."""
    return 1 + max(0, len(row) - first)


def _stacked(features: Sequence[Tensor], counts: Sequence[int], least: int) -> Text:
    """Rows (n, D), of which so many positions are real, right-padded to `least` at least."""
    longest = max(least, *counts)
    tokens = features[0].new_zeros(len(features), longest, features[0].shape[-1])
    for row, found in zip(tokens, features, strict=True):
        row[: len(found)] = found[:longest]
    mask = torch.arange(longest) < torch.tensor(counts)[:, None]
    return Text(tokens, queued(mask, tokens.device))


def _pretrained(model: str, dtype: Dtype, variant: str | None, drawn: bool) -> Any:
    config = read_config(model, drawn)
    if config.model_type in T5_FAMILY or config.is_encoder_decoder:
        kind = config.model_type
        raise SpecError(f"{model!r} holds a {kind} model, expected a decoder; did you mean text_encoder 't5'?")
    return load_network(
        AutoModel, model, dtype, variant, drawn
    ).get_decoder()  # without what a multimodal model has beside it


def _tiny(width: int, layers: int, heads: int, vocabulary: int, dtype: Dtype) -> Any:
    """Gemma at toy size: of Gemma, Gemma 2, Llama and Qwen 3 it learned fastest from nothing, in steps and in time."""
    if width % (2 * heads):
        raise SpecError(f"width {width} is not a multiple of 2 x heads {heads}: rotary positions turn pairs")
    config = GemmaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=width // heads,
    )
    decoder: Any = GemmaModel(config)
    return decoder.to(tiny_dtype(dtype))
