"""Encoders whose features are the last hidden states of all tokens: what T5 and BERT-like encoders share."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sana_lab.models.text import Null, TextEncoder
from sana_lab.models.text.tokenizer import check_prompts, count_truncated, pad_rows, padding_id, token_rows
from sana_lab.ops.transfer import to_device
from sana_lab.types import Text


class BidirectionalEncoder(TextEncoder):
    """A tokenizer and a network of transformers, frozen where it is pretrained.

    A subclass passes both to its constructor and implements `features`.
    """

    def __init__(
        self, network: Any, tokenizer: Any, *, pretrained: bool, max_tokens: int, pad_to_max: bool, null: Null
    ) -> None:
        super().__init__()
        self.network, self.tokenizer, self.pretrained = network, tokenizer, pretrained
        self.max_tokens, self.pad_to_max, self.null = max_tokens, pad_to_max, null
        self.dim = network.config.hidden_size
        self.train(not pretrained)

    @abstractmethod
    def features(self, ids: Tensor, mask: Tensor, host_mask: Tensor) -> Tensor:
        """Last hidden states (B, L, D) of token ids (B, L); mask (B, L) bool, on the network's device and the host."""

    def forward(self, prompts: Sequence[str]) -> Text:
        """Last hidden states; a longer prompt is truncated to `max_tokens` and keeps its last, special token."""
        return self.without_instruction(prompts)

    def without_instruction(self, prompts: Sequence[str], length: int = 0) -> Text:
        texts = check_prompts(prompts)
        rows = token_rows(self.tokenizer, texts, self.max_tokens)
        self.warn_truncated(count_truncated(self.tokenizer, texts, rows, self.max_tokens))
        ids, host_mask = pad_rows(rows, padding_id(self.tokenizer), self.max_tokens if self.pad_to_max else length)
        ids, mask = to_device(ids, self.network.device), to_device(host_mask, self.network.device)
        return Text(self.features(ids, mask, host_mask), mask)
