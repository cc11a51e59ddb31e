"""Decoder-only language models as text encoders, with a complex human instruction (SANA, arXiv 2410.10629, 2.3).

Legend: B prompts, L tokens, D feature width, S tokens after a cached prefix.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Annotated, Any, final

import torch
from torch import Tensor
from transformers import AutoModel, GemmaConfig, GemmaModel

from sana_lab.config.ranges import Depth, Tokens, Width
from sana_lab.config.specs import RUNTIME, AsBefore, SpecError
from sana_lab.models.text import Null, TextEncoder
from sana_lab.models.text.attention_masks import attention_mask
from sana_lab.models.text.instruction import read_instruction
from sana_lab.models.text.loading import Dtype, check_family, load_network, load_tokenizer, read_config, tiny_dtype
from sana_lab.models.text.prefix_cache import FeatureCache, Table, TokenIds
from sana_lab.models.text.tokenizer import (
    check_prompts,
    count_truncated,
    offline_tokenizer,
    pad_rows,
    padding_id,
    token_rows,
)
from sana_lab.ops.transfer import to_device
from sana_lab.types import Text


@final
class Llm(TextEncoder):
    """A pretrained decoder (Gemma, Qwen, Llama ...), or without `model` a tiny Gemma that trains with the DiT.

    Features are the last hidden states after the final norm, in the network's dtype. The instruction precedes every
    prompt but "", which is the null condition; nothing is generated. As in SANA's released code, of the (instruction +
    `max_tokens` - 2) positions BOS and the last `max_tokens` - 1 are kept, so that the window begins at the
    instruction's last token.
    """

    def __init__(
        self,
        model: str | None = None,  # folder or hub id of a decoder; null builds a tiny Gemma to train
        max_tokens: Tokens = 300,  # features kept per prompt, BOS included; at least 2, longer prompts are truncated
        # text before each prompt: sana_lab, released (of SanaPipeline), file:PATH or the text itself; null for none
        instruction: str | None = None,
        dtype: Dtype = "auto",  # dtype of weights and features; auto: as stored, float32 for the tiny Gemma
        width: Width = 64,  # channels of the tiny Gemma, a multiple of 2 x `heads`
        layers: Depth = 2,  # transformer blocks of the tiny Gemma
        heads: Width = 2,  # attention heads of the tiny Gemma
        pad_to_max: Annotated[bool, RUNTIME] = False,  # pad to `max_tokens`, not to the batch's longest prompt
        # attention mask of the null condition: diffusers (its own, one token for "") or nvlabs (the prompt's)
        null: Annotated[Null, AsBefore("diffusers")] = "diffusers",
        # lower-case and strip prompts, as diffusers does and NVlabs does not
        lowercase: Annotated[bool, AsBefore(False)] = False,
        # variant of the model's weight files, such as fp16; null is the default or the only one
        variant: Annotated[str | None, AsBefore(None)] = None,
        # random weights in the published configuration of `model`, offline tokenizer: for measuring speed
        random_init: Annotated[bool, AsBefore(False)] = False,
        # while frozen, encode the instruction once and reuse features of recent prompts; equal up to rounding
        cache: Annotated[bool, RUNTIME] = True,
    ) -> None:
        super().__init__()
        if max_tokens < 2:
            raise SpecError(f"max_tokens is {max_tokens}, expected at least 2: BOS and a word")
        self.pretrained, self.max_tokens, self.pad_to_max = model is not None, max_tokens, pad_to_max
        if model is None:
            self.tokenizer = offline_tokenizer(start=True)
            self.network = _tiny(width, layers, heads, len(self.tokenizer), dtype)
        else:
            self.network = _pretrained(model, dtype, variant, random_init)
            self.tokenizer = load_tokenizer(model, random_init)
        self.train(not self.pretrained)
        self.dim = self.network.config.hidden_size
        self.null, self.lowercase = null, lowercase
        self.cache = FeatureCache() if cache else None
        self.instruction_option = instruction
        if instruction != "released":  # read at the first prompt, so that a system loads without diffusers
            read_instruction(instruction)

    @cached_property
    def instruction(self) -> str:
        """The text before each prompt."""
        return read_instruction(self.instruction_option)

    @cached_property
    def window_start(self) -> int:
        """The first position, after BOS, whose features are kept: the instruction's last token."""
        return max(1, len(self._ids(self.instruction)) - 1)

    def forward(self, prompts: Sequence[str]) -> Text:
        texts = [self.instruction + prompt if prompt else "" for prompt in self._checked(prompts)]
        return self._encode(texts, self.window_start)

    def without_instruction(self, prompts: Sequence[str], length: int = 0) -> Text:
        return self._encode(self._checked(prompts), 1, length)

    def clear_cache(self) -> None:
        """Discard cached features of prompts; those of the instruction and of texts without it are kept."""
        if self.cache is not None:
            self.cache.clear("prompt")

    def _checked(self, prompts: Sequence[str]) -> list[str]:
        checked = check_prompts(prompts)
        return [prompt.lower().strip() for prompt in checked] if self.lowercase else checked

    def _encode(self, texts: list[str], start: int, length: int = 0) -> Text:
        """Features of BOS and of positions from `start` on, at most `max_tokens` together.

        With the cache, features at padding are zeros, except in `padded` texts (`length` > 0).
        """
        limit = start + self.max_tokens - 1
        rows = token_rows(self.tokenizer, texts, limit)
        self.warn_truncated(count_truncated(self.tokenizer, texts, rows, limit))
        min_length = limit if self.pad_to_max else length
        if self.cache is None or not self.cache.validate(self.network):
            return self._run(rows, start, min_length)
        table: Table = "padded" if length else "prompt" if start > 1 else "plain"
        features = self._lookup(self.cache, table, [tuple(row) for row in rows], start)
        return _stack(features, [_kept_tokens(row, start) for row in rows], 1 + min_length - start)

    def _run(self, rows: Sequence[Sequence[int]], start: int, min_length: int = 0) -> Text:
        """Encode whole rows, padded to at least `min_length`, and keep BOS and positions from `start` on."""
        ids, mask = pad_rows(rows, padding_id(self.tokenizer), min_length)
        ids, device_mask = to_device(ids, self.network.device), to_device(mask, self.network.device)
        visible = attention_mask(self.network, mask, device_mask)
        hidden = self.network(input_ids=ids, attention_mask=visible, use_cache=False).last_hidden_state
        return Text(*(torch.cat([x[:, :1], x[:, start:]], 1) for x in (hidden, device_mask)))

    def _lookup(self, cache: FeatureCache, table: Table, rows: list[TokenIds], start: int) -> list[Tensor]:
        """Features (L, D) of each row; in the table `padded` of all `max_tokens` positions, else of real ones."""
        if table == "padded":
            return cache.lookup(table, rows, lambda missing: self._run(missing, start, self.max_tokens).tokens.clone())
        return cache.lookup(table, rows, lambda missing: self._encode_missing(cache, missing, start))

    def _encode_missing(self, cache: FeatureCache, rows: list[TokenIds], start: int) -> Iterator[Tensor]:
        """Features (L, D) of each row's real tokens; rows that begin with the instruction reuse its keys and values."""
        prefix = cache.prefix_of(self.network, self._ids(self.instruction)[:start])
        continued = [] if prefix is None else [row for row in rows if 2 * prefix.shared_length(row) >= len(prefix.ids)]
        features: dict[TokenIds, Tensor] = {}
        if prefix is not None and continued:
            n, hidden = prefix.encode_suffixes(self.network, continued, padding_id(self.tokenizer))  # (B, S, D)
            for row, suffix in zip(continued, hidden[:, start - n :], strict=True):
                features[row] = torch.cat([prefix.first[0], suffix[: _kept_tokens(row, start) - 1]])
        if others := [row for row in rows if row not in features]:
            tokens = self._run(others, start).tokens
            features |= {row: x[: _kept_tokens(row, start)].clone() for row, x in zip(others, tokens, strict=True)}
        return iter([features[row] for row in rows])

    def _ids(self, text: str) -> TokenIds:
        return tuple(self.tokenizer([text])["input_ids"][0])


def _kept_tokens(row: Sequence[int], start: int) -> int:
    """Number of a row's kept positions that are real: BOS and those from `start` on; at least one, as in `pad_rows`."""
    return 1 + max(0, len(row) - start)


def _stack(features: Sequence[Tensor], counts: Sequence[int], min_length: int) -> Text:
    """Features (L_i, D), the first `counts[i]` of them real, as one batch right-padded to at least `min_length`."""
    length = max(min_length, *counts)
    tokens = features[0].new_zeros(len(features), length, features[0].shape[-1])
    for row, values in zip(tokens, features, strict=True):
        row[: len(values)] = values[:length]
    mask = torch.arange(length) < torch.tensor(counts)[:, None]
    return Text(tokens, to_device(mask, tokens.device))


def _pretrained(model: str, dtype: Dtype, variant: str | None, random_init: bool) -> Any:
    config = read_config(model, random_init)
    check_family(config, model, "llm")
    network = load_network(AutoModel, model, dtype, variant, random_init)
    return network.get_decoder()  # of a multimodal model, only the language model


def _tiny(width: int, layers: int, heads: int, vocabulary: int, dtype: Dtype) -> Any:
    """Tiny Gemma: trained from scratch, it learns fastest of Gemma, Gemma 2, Llama and Qwen 3."""
    if width % (2 * heads):
        raise SpecError(f"width {width} is not a multiple of 2 x heads {heads}: rotary embeddings rotate pairs")
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
