"""What a frozen decoder need not read twice: the instruction before every prompt, and whole prompts.

Legend: B rows, n tokens of the beginning that rows share, S tokens after it, D width of the features.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from sana_lab.models.layers import queued
from sana_lab.models.text.attention_masks import attention_mask
from sana_lab.models.text.tokenizer import padded

Row = tuple[int, ...]
"""A text's token ids."""

Shelf = Literal["prompt", "plain", "whole"]
"""Prompts after the instruction; texts without it; those with the features of padding, which `nvlabs` looks at."""

MOST: dict[Shelf, int] = {"prompt": 64, "plain": 8, "whole": 8}
"""Texts whose features are kept: of Gemma 2 in bfloat16 at 300 tokens 1.4 MB each."""

CAUSAL = {"full_attention", "sliding_attention"}


class Memory:
    """What a network said, for as long as its weights are those that said it; copies begin empty."""

    def __init__(self) -> None:
        self.forget()

    def forget(self, *shelves: Shelf) -> None:
        """The features of those texts, or everything."""
        if shelves:
            self.kept.update({shelf: {} for shelf in shelves})
            return
        self.kept: dict[Shelf, dict[Row, Tensor]] = {shelf: {} for shelf in MOST}
        self.beginning: Beginning | None = None
        self.weights: Weights | None = None

    def __reduce__(self) -> tuple[type["Memory"], tuple[()]]:
        return type(self), ()

    def serves(self, network: nn.Module) -> bool:
        """Whether the network is frozen, so that what it says may be kept. Else, and where its weights are others than
        those that were here last, everything is forgotten."""
        weights = Weights.of(network) if frozen(network) else None
        if self.weights is None or weights is None or not self.weights.are(weights):
            self.forget()
        self.weights = weights
        return weights is not None

    def recall(self, shelf: Shelf, rows: Sequence[Row], read: Callable[[list[Row]], Iterable[Tensor]]) -> list[Tensor]:
        """Features of each row; those that are not known are read, each once. The least used are dropped."""
        kept = self.kept[shelf]
        new = [*dict.fromkeys(row for row in rows if row not in kept)]
        kept.update(zip(new, read(new) if new else (), strict=True))
        found = [kept[row] for row in rows]
        for row in dict.fromkeys(rows):
            kept[row] = kept.pop(row)  # the last used are last
        for row in [*kept][: max(0, len(kept) - MOST[shelf])]:
            del kept[row]
        return found

    def begun(self, network: Any, ids: Row) -> "Beginning | None":
        """The network after these tokens; None where it is no plain causal decoder, or they are too few to matter."""
        if len(ids) < 8 or not causal(network.config):
            return None
        if self.beginning is None or self.beginning.ids != ids:
            self.beginning = Beginning.read(network, ids)
        return self.beginning


class Beginning(NamedTuple):
    """A decoder's keys and values of tokens that stand before others: causal, so the others change nothing in them."""

    ids: Row
    layers: list[tuple[Tensor, Tensor]]  # (1, heads, n, head width)
    first: Tensor  # (1, 1, D), the features of the first position

    @classmethod
    def read(cls, network: Any, ids: Row) -> "Beginning":
        cache = DynamicCache()
        given = queued(torch.tensor([ids]), network.device)
        hidden = network(input_ids=given, past_key_values=cache, use_cache=True).last_hidden_state
        layers: list[Any] = cache.layers
        return cls(ids, [(layer.keys, layer.values) for layer in layers], hidden[:, :1].clone())

    def shared(self, row: Row) -> int:
        """With how many of its tokens a row begins, its last left out: tokens may merge across the border."""
        pairs = zip(self.ids, row[:-1], strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self.ids), len(row) - 1))

    def after(self, network: Any, rows: Sequence[Row], fill: int) -> tuple[int, Tensor]:
        """Rows that share tokens with it: n, as many as all share, and features (B, S, D) of what follows those."""
        n = min(self.shared(row) for row in rows)
        ids, mask = padded([row[n:] for row in rows], fill)
        ids, there = queued(ids, network.device), queued(mask, network.device)
        seen = attention_mask(network, mask, there, n)
        past = Cache(layers=[After(k[:, :, :n], v[:, :, :n]) for k, v in self.layers])
        hidden = network(input_ids=ids, attention_mask=seen, past_key_values=past, use_cache=True).last_hidden_state
        return n, hidden


class After(DynamicLayer):
    """A layer's keys and values of the beginning, one row for all; what is read after it is not kept.

    Layers with a sliding window have all of it too: their mask says what they see.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys: Tensor = keys
        self.values: Tensor = values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        rows = len(key_states)
        keys, values = self.keys.expand(rows, -1, -1, -1), self.values.expand(rows, -1, -1, -1)
        return torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)


class Weights(NamedTuple):
    """Which tensors a network computes with, and in which state: that of their counters of changes in place."""

    tensors: list[tuple[weakref.ref[Tensor], int, int]]  # with version and address
    autocast: torch.dtype | None

    @classmethod
    def of(cls, network: nn.Module) -> "Weights | None":
        """None where tensors do not count their changes (inference mode) or have no address (quantised)."""
        try:
            found = [(weakref.ref(t), t._version, t.data_ptr()) for t in _tensors(network)]
        except RuntimeError:
            return None
        device = next(_tensors(network)).device.type
        return cls(found, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None)

    def are(self, other: "Weights") -> bool:
        """The same tensors, not changed in between."""
        same = len(self.tensors) == len(other.tensors) and self.autocast == other.autocast
        pairs = zip(self.tensors, other.tensors, strict=False)
        return same and all(a[0]() is b[0]() and a[1:] == b[1:] for a, b in pairs)


def frozen(network: nn.Module) -> bool:
    """Whether a network is in evaluation mode, nothing in it trains, and no gradient is asked for."""
    idle = not torch.is_grad_enabled() and not any(m.training for m in network.modules())
    return idle and not any(t.requires_grad or t.is_meta for t in _tensors(network))


def causal(config: Any) -> bool:
    """Whether every layer is attention to earlier tokens alone, whose keys and values can stand for them."""
    kinds = set(getattr(config, "layer_types", None) or CAUSAL)
    both = getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True)
    return kinds <= CAUSAL and not both and not getattr(config, "num_kv_shared_layers", 0)


def _tensors(network: nn.Module) -> Iterator[Tensor]:
    return chain(network.parameters(), network.buffers())
