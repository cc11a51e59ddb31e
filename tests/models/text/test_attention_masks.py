"""Masks built here give transformers networks the features of the plain token mask, to the last bit."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding

from sana_lab.models.text.attention_masks import attention_mask

TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY |= {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": 50, "pad_token_id": 0}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 50}
KINDS = {"gemma": TINY, "gemma2": TINY, "llama": TINY, "mistral": TINY, "qwen2": TINY, "qwen3": TINY, "t5": T5}
RAGGED, WHOLE = torch.arange(7) < torch.tensor([[3], [7], [1]]), torch.ones(3, 7, dtype=torch.bool)


def network(kind: str, how: str, **options: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **KINDS[kind], **options)
    family = AutoModelForTextEncoding if kind == "t5" else AutoModel
    model = family.from_config(config, attn_implementation=how).eval()
    return model.encoder if kind == "t5" else model


@torch.no_grad()
def features(model: Any, mask: torch.Tensor | None) -> torch.Tensor:
    ids = torch.randint(1, 50, (3, 7), generator=torch.Generator().manual_seed(1))
    return model(input_ids=ids, attention_mask=mask).last_hidden_state


@pytest.mark.parametrize("mask", [RAGGED, WHOLE], ids=["ragged", "whole"])
@pytest.mark.parametrize(
    ("kind", "how"), [(k, h) for k in KINDS for h in ("sdpa", "eager") if (k, h) != ("gemma2", "sdpa")]
)
def test_features_are_those_of_the_plain_mask(kind: str, how: str, mask: torch.Tensor):
    model = network(kind, how)
    own = attention_mask(model, mask, mask)
    assert own is None or own.shape == (3, 1, 7, 7)
    assert torch.equal(features(model, own), features(model, mask))


@pytest.mark.parametrize("options", [{"sliding_window": 4}, {"model_type": "gpt_neox"}])
def test_what_is_not_known_here_is_left_to_transformers(options: dict[str, Any]):
    """A window shorter than the text, and a kind of network that is not in the list."""
    model = network("mistral", "sdpa", **{k: v for k, v in options.items() if k == "sliding_window"})
    model.config.model_type = options.get("model_type", "mistral")
    assert attention_mask(model, RAGGED, RAGGED) is RAGGED


def test_half_precision_has_its_own_least_number():
    model = network("gemma2", "eager").bfloat16()
    own = attention_mask(model, RAGGED, RAGGED)
    assert own is not None
    assert own.dtype == torch.bfloat16
    assert torch.equal(features(model, own), features(model, RAGGED))
