"""A decoder-only language model as text encoder: its last hidden state, with a complex human instruction in front."""

from collections.abc import Sequence
from typing import final

from transformers import AutoModel, Gemma2Config, Gemma2Model

from sana_lab.text import TextEncoder
from sana_lab.text.load import Dtype, check_prompts, padded, pretrained
from sana_lab.text.tokenizer import offline_tokenizer
from sana_lab.types import Text


@final
class Llm(TextEncoder):
    """A pretrained decoder (`model`: folder or hub id of Gemma, Qwen, Llama ...), or a small Gemma-2 to be trained.

    `instruction` is put before every prompt but the empty one, and read, never answered: of the hidden states, the
    beginning of the sequence and the last `max_tokens` - 1 positions of instruction + prompt's room are kept, so the
    kept window begins at about the instruction's last token (SANA, section 2.3, and its released code).
    """

    def __init__(
        self,
        model: str | None = None,
        max_tokens: int = 300,
        instruction: str | None = None,
        dtype: Dtype = "float32",
        width: int = 64,
        layers: int = 2,
        heads: int = 2,
    ) -> None:
        super().__init__()
        self.pretrained, self.max_tokens, self.instruction = model is not None, max_tokens, instruction
        if model is None:
            self.tokenizer = offline_tokenizer()
            self.network = Gemma2Model(small(width, layers, heads, len(self.tokenizer)))
        else:
            self.network, self.tokenizer = pretrained(AutoModel.from_pretrained, model, dtype)
        self.dim = self.network.config.hidden_size

    def forward(self, prompts: Sequence[str]) -> Text:
        prompts = check_prompts(prompts)
        if self.instruction is None or not any(prompts):
            return self._encode([self._ids(p)[: self.max_tokens] for p in prompts])
        return self._with_instruction(prompts)

    def _with_instruction(self, prompts: Sequence[str]) -> Text:
        """Rows of instruction + prompt in a room of instruction + max_tokens - 2, of which the window is kept."""
        assert self.instruction is not None
        room = len(self._ids(self.instruction)) + self.max_tokens - 2
        rows = [self._ids(self.instruction + p)[:room] if p else self._ids(p)[: self.max_tokens] for p in prompts]
        text = self._encode(rows)
        first = max(1, room - self.max_tokens + 1)  # of the window, after the beginning of the sequence
        kept = [0, *range(first, text.tokens.shape[1])]
        empty = [i for i, p in enumerate(prompts) if not p]
        tokens, mask = text.tokens[:, kept], text.mask[:, kept]
        for i in empty:  # the null condition has no instruction: its own first positions
            tokens[i], mask[i] = text.tokens[i, : len(kept)], text.mask[i, : len(kept)]
        return Text(tokens, mask)

    def _encode(self, rows: Sequence[Sequence[int]]) -> Text:
        ids, mask = padded(rows, self.tokenizer.pad_token_id or 0, self.network.device)
        return Text(self.network(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state, mask)

    def _ids(self, text: str) -> list[int]:
        """Token ids with the model's own beginning: the tokenizer's, or at least one token where it adds none."""
        ids = self.tokenizer(text)["input_ids"]
        begin = self.tokenizer.bos_token_id
        if begin is not None and ids[:1] != [begin]:
            return [begin, *ids]
        return ids or [self.tokenizer.eos_token_id]


def small(width: int, layers: int, heads: int, vocabulary: int) -> Gemma2Config:
    """Gemma-2 at toy size; attention in plain PyTorch."""
    config = Gemma2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=width // heads,
        query_pre_attn_scalar=width // heads,
        max_position_embeddings=512,
        use_cache=False,
    )
    config._attn_implementation = "eager"
    return config
