"""T5 encoders (arXiv 1910.10683): bidirectional, the text encoder of PixArt and Imagen."""

from collections.abc import Sequence
from typing import final

import torch
from transformers import AutoConfig, T5Config, T5EncoderModel, UMT5EncoderModel

from sana_lab.text import TextEncoder
from sana_lab.text.load import Dtype, check_prompts, padded, pretrained
from sana_lab.text.tokenizer import offline_tokenizer
from sana_lab.types import Text


@final
class T5(TextEncoder):
    """A pretrained T5 or UMT5 encoder (`model`: folder or hub id), or, without one, a small T5 to be trained with the DiT."""

    def __init__(
        self,
        model: str | None = None,
        max_tokens: int = 300,
        dtype: Dtype = "float32",
        width: int = 64,
        layers: int = 2,
        heads: int = 2,
    ) -> None:
        super().__init__()
        self.pretrained, self.max_tokens = model is not None, max_tokens
        if model is None:
            self.tokenizer = offline_tokenizer()
            self.network = T5EncoderModel(small(width, layers, heads, len(self.tokenizer)))
        else:
            self.network, self.tokenizer = pretrained(_loader, model, dtype)
        self.dim = self.network.config.d_model

    def forward(self, prompts: Sequence[str]) -> Text:
        rows = self.tokenizer(check_prompts(prompts), add_special_tokens=False)["input_ids"]
        end = [self.tokenizer.eos_token_id]
        ids, mask = padded([row[: self.max_tokens - 1] + end for row in rows], self.tokenizer.pad_token_id, self.network.device)
        return Text(self.network(input_ids=ids, attention_mask=mask).last_hidden_state, mask)


def small(width: int, layers: int, heads: int, vocabulary: int) -> T5Config:
    """T5 1.1 at toy size, without dropout."""
    return T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=width // heads,
        d_ff=2 * width,
        num_layers=layers,
        num_heads=heads,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        use_cache=False,
    )


def _loader(model: str, *, dtype: torch.dtype, local_files_only: bool) -> torch.nn.Module:
    kind = AutoConfig.from_pretrained(model, local_files_only=local_files_only).model_type
    encoder = UMT5EncoderModel if kind == "umt5" else T5EncoderModel
    return encoder.from_pretrained(model, dtype=dtype, local_files_only=local_files_only)
