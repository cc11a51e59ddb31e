"""Caches of a frozen decoder: keys and values of the instruction, and features of recent prompts.

Legend: B rows, n tokens of the prefix that all rows share, S tokens after it, D feature width.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from sana_lab.models.text.attention_masks import attention_mask
from sana_lab.models.text.tokenizer import pad_rows
from sana_lab.ops.transfer import to_device

TokenIds = tuple[int, ...]

Table = Literal["prompt", "plain", "padded"]
"""Prompts after the instruction; texts without instruction; the latter with features of padding (`null: nvlabs`)."""

CAPACITY: dict[Table, int] = {"prompt": 64, "plain": 8, "padded": 8}
"""Texts per table. Features of Gemma 2 2B in bfloat16 at 300 tokens take 1.4 MB a text."""

MIN_PREFIX = 8  # tokens; running a shorter prefix separately saves nothing

CAUSAL_LAYERS = {"full_attention", "sliding_attention"}


class FeatureCache:
    """LRU cache of text-encoder outputs, invalidated when the weights change; copies and pickles are empty."""

    def __init__(self) -> None:
        self.clear()

    def clear(self, *tables: Table) -> None:
        """Empty the given tables, or everything if none is given."""
        if tables:
            self.features.update({table: {} for table in tables})
            return
        self.features: dict[Table, dict[TokenIds, Tensor]] = {table: {} for table in CAPACITY}
        self.prefix: Prefix | None = None
        self.weights: WeightsVersion | None = None

    def __reduce__(self) -> tuple[type["FeatureCache"], tuple[()]]:
        return type(self), ()

    def validate(self, network: nn.Module) -> bool:
        """Whether outputs of `network` may be cached: it is frozen and its tensors have version counters.

        Clears the cache if the weights changed since the last call.
        """
        weights = WeightsVersion.of(network) if frozen(network) else None
        if self.weights is None or weights is None or not self.weights.matches(weights):
            self.clear()
        self.weights = weights
        return weights is not None

    def lookup(
        self, table: Table, rows: Sequence[TokenIds], encode: Callable[[list[TokenIds]], Iterable[Tensor]]
    ) -> list[Tensor]:
        """Features of each row; `encode` computes missing ones, each distinct row once."""
        cached = self.features[table]
        missing = [*dict.fromkeys(row for row in rows if row not in cached)]
        cached.update(zip(missing, encode(missing) if missing else (), strict=True))
        features = [cached[row] for row in rows]
        for row in dict.fromkeys(rows):
            cached[row] = cached.pop(row)  # the most recently used are last
        for row in [*cached][: max(0, len(cached) - CAPACITY[table])]:
            del cached[row]
        return features

    def prefix_of(self, network: Any, ids: TokenIds) -> "Prefix | None":
        """Keys and values of these tokens; None if the network is not a plain causal decoder or there are too few."""
        if len(ids) < MIN_PREFIX or not causal(network.config):
            return None
        if self.prefix is None or self.prefix.ids != ids:
            self.prefix = Prefix.encode(network, ids)
        return self.prefix


class Prefix(NamedTuple):
    """A causal decoder's keys and values of a prefix, which later tokens do not change."""

    ids: TokenIds
    layers: list[tuple[Tensor, Tensor]]  # keys and values, each (1, heads, n, head width)
    first: Tensor  # (1, 1, D), features of the first position

    @classmethod
    def encode(cls, network: Any, ids: TokenIds) -> "Prefix":
        cache = DynamicCache()
        input_ids = to_device(torch.tensor([ids]), network.device)
        hidden = network(input_ids=input_ids, past_key_values=cache, use_cache=True).last_hidden_state
        layers: list[Any] = cache.layers
        return cls(ids, [(layer.keys, layer.values) for layer in layers], hidden[:, :1].clone())

    def shared_length(self, row: TokenIds) -> int:
        """Length of the common prefix with a row, its last token excluded because tokens may merge at the border."""
        pairs = zip(self.ids, row[:-1], strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self.ids), len(row) - 1))

    def encode_suffixes(self, network: Any, rows: Sequence[TokenIds], fill: int) -> tuple[int, Tensor]:
        """(n, features (B, S, D)): the prefix length shared by all rows, and features of each row's tokens after it."""
        n = min(self.shared_length(row) for row in rows)
        ids, mask = pad_rows([row[n:] for row in rows], fill)
        ids, device_mask = to_device(ids, network.device), to_device(mask, network.device)
        visible = attention_mask(network, mask, device_mask, n)
        past = Cache(layers=[PrefixLayer(k[:, :, :n], v[:, :, :n]) for k, v in self.layers])
        hidden = network(input_ids=ids, attention_mask=visible, past_key_values=past, use_cache=True).last_hidden_state
        return n, hidden


class PrefixLayer(DynamicLayer):
    """One layer's keys and values (1, heads, n, head width) of the prefix, shared by all rows of a batch.

    `update` appends to a copy, so later tokens are not stored. Sliding-window layers get the whole prefix too; their
    mask limits what they attend to.
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


class WeightsVersion(NamedTuple):
    """Identity of a network's parameters and buffers, with their counters of in-place changes, and its autocast."""

    tensors: list[tuple[weakref.ref[Tensor], int, int]]  # tensor, version, address
    autocast: torch.dtype | None

    @classmethod
    def of(cls, network: nn.Module) -> "WeightsVersion | None":
        """None if tensors have no version counter (inference mode) or no address (quantised)."""
        try:
            tensors = [(weakref.ref(t), t._version, t.data_ptr()) for t in _tensors(network)]
        except RuntimeError:
            return None
        device = next(_tensors(network)).device.type
        return cls(tensors, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None)

    def matches(self, other: "WeightsVersion") -> bool:
        """Whether the tensors are the same and unchanged."""
        same = len(self.tensors) == len(other.tensors) and self.autocast == other.autocast
        pairs = zip(self.tensors, other.tensors, strict=False)
        return same and all(a[0]() is b[0]() and a[1:] == b[1:] for a, b in pairs)


def frozen(network: nn.Module) -> bool:
    """Whether a network is in evaluation mode, has no trainable tensor, and gradients are off."""
    idle = not torch.is_grad_enabled() and not any(m.training for m in network.modules())
    return idle and not any(t.requires_grad or t.is_meta for t in _tensors(network))


def causal(config: Any) -> bool:
    """Whether every layer attends only to earlier tokens and has its own keys and values."""
    kinds = set(getattr(config, "layer_types", None) or CAUSAL_LAYERS)
    bidirectional = getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True)
    return kinds <= CAUSAL_LAYERS and not bidirectional and not getattr(config, "num_kv_shared_layers", 0)


def _tensors(network: nn.Module) -> Iterator[Tensor]:
    return chain(network.parameters(), network.buffers())
