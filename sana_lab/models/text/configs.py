"""Published configurations of the presets' text encoders, for checking and counting experiments offline.

Each holds the entries of the model's config.json that differ from the defaults of its transformers class. Weights and
tokenizers are fetched when prompts are encoded. Parameter counts agree with the SANA paper, Table 13.
"""

from typing import Any

_GEMMA_2_2B: dict[str, Any] = {
    "model_type": "gemma2",
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
}
_GEMMA_2B: dict[str, Any] = {
    "model_type": "gemma",
    "vocab_size": 256000,
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
}


def _t5(width: int, hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "t5",
        "vocab_size": 32128,
        "d_model": width,
        "d_kv": 64,
        "d_ff": hidden,
        "num_layers": layers,
        "num_heads": heads,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    }


_MINILM: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "google/gemma-2-2b": _GEMMA_2_2B,
    "google/gemma-2-2b-it": _GEMMA_2_2B,
    "Efficient-Large-Model/gemma-2-2b-it": _GEMMA_2_2B,
    "google/gemma-2b": _GEMMA_2B,
    "google/gemma-2b-it": _GEMMA_2B,
    "google/t5-v1_1-small": _t5(512, 1024, 8, 6),
    "google/t5-v1_1-base": _t5(768, 2048, 12, 12),
    "google/t5-v1_1-large": _t5(1024, 2816, 24, 16),
    "google/t5-v1_1-xl": _t5(2048, 5120, 24, 32),
    "google/t5-v1_1-xxl": _t5(4096, 10240, 24, 64),
    "DeepFloyd/t5-v1_1-xxl": _t5(4096, 10240, 24, 64),
    "sentence-transformers/all-MiniLM-L6-v2": _MINILM,
}
"""Hub id -> configuration."""
