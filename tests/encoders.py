"""Pretrained text encoders without their weights: real configurations and a toy tokenizer in folders of this machine.

On the meta device that is all that an experiment needs of them: their width and their size.
"""

from pathlib import Path
from typing import Any

from transformers import Gemma2Config, GemmaConfig, PreTrainedConfig, T5Config

from sana_lab.models.text.tokenizer import offline_tokenizer

GEMMA = {"vocab_size": 256000, "num_attention_heads": 8, "head_dim": 256}


def t5(width: int, hidden: int, layers: int, heads: int) -> T5Config:
    sizes = {"d_model": width, "d_kv": 64, "d_ff": hidden, "num_layers": layers, "num_heads": heads}
    return T5Config(**sizes, vocab_size=32128, feed_forward_proj="gated-gelu", tie_word_embeddings=False)


def gemma2() -> Gemma2Config:
    sizes = {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_key_value_heads": 4}
    return Gemma2Config(**GEMMA, **sizes)


def gemma() -> GemmaConfig:
    sizes = {"hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18, "num_key_value_heads": 1}
    return GemmaConfig(**GEMMA, **sizes)


ENCODERS: dict[str, tuple[PreTrainedConfig, int]] = {
    "google/t5-v1_1-xxl": (t5(4096, 10240, 24, 64), 4762),
    "google/t5-v1_1-large": (t5(1024, 2816, 24, 16), 341),
    "Efficient-Large-Model/gemma-2-2b-it": (gemma2(), 2614),
    "google/gemma-2-2b": (gemma2(), 2614),
    "google/gemma-2b-it": (gemma(), 2506),
}
"""Hub id -> its configuration as known here, and the millions of parameters that the SANA paper gives (Table 9)."""


def stand_in(model: str, home: Path) -> str:
    """A folder with the configuration of that hub id."""
    folder = home / model.replace("/", "--")
    if not folder.exists():
        ENCODERS[model][0].save_pretrained(folder)
        offline_tokenizer(start=True).save_pretrained(folder)
    return str(folder)


def offline(experiment: dict[str, Any], home: Path) -> dict[str, Any]:
    """The experiment with its pretrained text encoder replaced by a folder of the same shape."""
    encoder = experiment["system"].get("text_encoder") or {}
    if encoder.get("model") is None:
        return experiment
    encoder = {**encoder, "model": stand_in(encoder["model"], home)}
    return {**experiment, "system": {**experiment["system"], "text_encoder": encoder}}
