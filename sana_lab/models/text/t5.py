"""T5 encoders (arXiv 1910.10683): bidirectional, the text encoders of Imagen and PixArt."""

from collections.abc import Sequence
from typing import Annotated, Any, final

from torch import nn
from transformers import AutoModelForTextEncoding, T5Config, T5EncoderModel

from sana_lab.config.specs import RUNTIME, AsBefore, SpecError
from sana_lab.models.layers import queued
from sana_lab.models.text import Null, TextEncoder
from sana_lab.models.text.attention_masks import attention_mask
from sana_lab.models.text.loading import T5_FAMILY, Dtype, load_network, load_tokenizer, read_config, tiny_dtype
from sana_lab.models.text.tokenizer import check_prompts, offline_tokenizer, padded, padding, token_rows, tokens_cut
from sana_lab.types import Text


@final
class T5(TextEncoder):
    """A pretrained T5, mT5 or UMT5 encoder (`model`: folder or hub id), or without one a tiny T5 to train with the DiT.

    `pretrained` says which; `width`, `layers` and `heads` are the tiny one's. Features come in the network's own dtype.
    `drawn` takes the shape of `model` alone, with random weights and the offline tokenizer, for speed.
    """

    def __init__(
        self,
        model: str | None = None,
        max_tokens: int = 300,
        dtype: Dtype = "auto",
        width: int = 64,
        layers: int = 2,
        heads: int = 2,
        pad_to_max: Annotated[bool, RUNTIME] = False,
        null: Annotated[Null, AsBefore("diffusers")] = "diffusers",
        drawn: Annotated[bool, AsBefore(False)] = False,
    ) -> None:
        super().__init__()
        if max_tokens < 2:
            raise SpecError(f"max_tokens is {max_tokens}, expected at least 2: a word and an end")
        self.pretrained, self.max_tokens, self.pad_to_max = model is not None, max_tokens, pad_to_max
        if model is None:
            self.tokenizer = offline_tokenizer(start=False)
            self.network = _tiny(width, layers, heads, len(self.tokenizer), dtype)
        else:
            self.network, self.tokenizer = _pretrained(model, dtype, drawn), load_tokenizer(model, drawn)
        self.null = null
        self.train(not self.pretrained)
        self.dim = self.network.config.d_model

    def forward(self, prompts: Sequence[str]) -> Text:
        """Last hidden states; a longer prompt is cut to `max_tokens`, its EOS kept."""
        return self.plain(prompts)

    def plain(self, prompts: Sequence[str], length: int = 0) -> Text:
        texts = check_prompts(prompts)
        rows = token_rows(self.tokenizer, texts, self.max_tokens)
        self.report(tokens_cut(self.tokenizer, texts, rows, self.max_tokens))
        ids, mask = padded(rows, padding(self.tokenizer), self.max_tokens if self.pad_to_max else length)
        ids, there = queued(ids, self.network.device), queued(mask, self.network.device)
        hidden = self.network(input_ids=ids, attention_mask=attention_mask(self.network, mask, there)).last_hidden_state
        return Text(hidden, there)


def _pretrained(model: str, dtype: Dtype, drawn: bool) -> Any:
    kind = read_config(model, drawn).model_type
    if kind not in T5_FAMILY:
        expected = ", ".join(T5_FAMILY)
        raise SpecError(f"{model!r} holds a {kind} model, expected {expected}; did you mean text_encoder 'llm'?")
    return load_network(
        AutoModelForTextEncoding, model, dtype, drawn=drawn
    ).encoder  # its embedding once, not under two names


def _tiny(width: int, layers: int, heads: int, vocabulary: int, dtype: Dtype) -> Any:
    """T5 1.1 at toy size, without dropout."""
    if width % heads:
        raise SpecError(f"width {width} is not a multiple of heads {heads}")
    config = T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=width // heads,
        d_ff=2 * width,
        num_layers=layers,
        num_heads=heads,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )
    encoder: Any = T5EncoderModel(config).encoder
    bias = encoder.block[0].layer[0].SelfAttention.relative_attention_bias
    nn.init.normal_(bias.weight)  # T5's own 1/sqrt(width) leaves a word blind to its neighbours for hundreds of steps
    return encoder.to(tiny_dtype(dtype))
