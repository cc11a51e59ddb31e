"""Transformer layers behind a text encoder, so that the encoder of a trained DiT can be exchanged.

Legend: B prompts, L tokens, D feature width of the inner encoder, C of the adapter, H heads.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Annotated, Self, final

import torch
from torch import Tensor, nn

from sana_lab.config import specs
from sana_lab.config.ranges import Depth, Positive, Ratio, Width
from sana_lab.config.specs import Spec, SpecError
from sana_lab.models.layers import Mlp, RmsNorm
from sana_lab.models.text import TextEncoder
from sana_lab.ops.softmax_attention import softmax_attention
from sana_lab.types import Text

EPS = 1e-12  # beside the mean square of a prompt's features


@final
class TextAdapter(TextEncoder):
    """The features of another text encoder, mapped to the width and scale of those that a DiT was trained with.

    Features are scaled to RMS 1, projected, and go through pre-norm layers that attend to all real tokens and begin as
    the identity; a last norm gives them the RMS `rms`. LDGen (arXiv 2502.18302) has three such layers between a
    language model and a DiT of T5. Tokens, mask, instruction and null condition are the inner encoder's.

    Without `train_encoder` the inner encoder is frozen and in no weights file: its spec says where its weights are.
    SpecError for heads that do not divide the width.
    """

    def __init__(
        self,
        encoder: Annotated[Spec, "text_encoder"] = "llm",  # inner encoder, such as experiment:NAME, or with `model`
        width: Width | None = None,  # channels that the DiT reads; null: those of the inner encoder
        layers: Depth = 3,  # transformer layers, at least 1
        heads: Width = 4,  # attention heads of a layer, a divisor of the width
        ratio: Ratio = 4.0,  # hidden width of a layer's MLP as a multiple of the width
        rms: Positive = 1.0,  # RMS of the features at first, that of the former encoder's; then learned per channel
        input_rms: Positive | None = None,  # RMS of the inner encoder's features; null measures that of each prompt
        train_encoder: bool = False,  # train the inner encoder too
    ) -> None:
        super().__init__()
        self.encoder: TextEncoder = specs.build("text_encoder", encoder)
        self.dim, self.max_tokens = width or self.encoder.dim, self.encoder.max_tokens
        self.null, self.prompts = self.encoder.null, self.encoder.prompts
        if self.dim % heads:
            raise SpecError(f"width {self.dim} is not a multiple of heads {heads}")
        self.input_rms, self.train_encoder = input_rms, train_encoder
        self.frozen = tuple(f"encoder.{name}" for name in self.encoder.frozen) if train_encoder else ("encoder",)
        self.project = nn.Linear(self.encoder.dim, self.dim)
        self.layers = nn.ModuleList(Layer(self.dim, heads, ratio) for _ in range(layers))
        self.norm = RmsNorm(self.dim, rms)
        if not train_encoder:
            self.encoder.requires_grad_(False).eval()

    def forward(self, prompts: Sequence[str]) -> Text:
        return self._adapted(partial(self.encoder, prompts))

    def without_instruction(self, prompts: Sequence[str], length: int = 0) -> Text:
        return self._adapted(partial(self.encoder.without_instruction, prompts, length))

    def clear_cache(self) -> None:
        """Discard the inner encoder's cached features."""
        self.encoder.clear_cache()

    def train(self, mode: bool = True) -> Self:
        """Set the mode; a frozen inner encoder stays in evaluation mode."""
        super().train(mode)
        self.encoder.train(mode and self.train_encoder)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Set whether it trains; a frozen inner encoder stays frozen."""
        super().requires_grad_(requires_grad)
        self.encoder.requires_grad_(requires_grad and self.train_encoder)
        return self

    def _adapted(self, encode: Callable[[], Text]) -> Text:
        with nullcontext() if self.train_encoder else torch.no_grad():
            text = encode()
        x = self.project(self._scaled(text).to(self.project.weight.dtype))
        for layer in self.layers:
            x = layer(x, text.mask)
        return Text(self.norm(x), text.mask)

    def _scaled(self, text: Text) -> Tensor:
        """Features (B, L, D) over `input_rms`, or over the RMS of each prompt's real tokens, in float32 or wider."""
        x = text.tokens.to(torch.promote_types(text.tokens.dtype, torch.float32))
        if self.input_rms is not None:
            return x / self.input_rms
        real = text.mask[..., None]
        squares = x.square().masked_fill(~real, 0).sum((1, 2), keepdim=True)
        return x * torch.rsqrt(squares / (real.sum(1, keepdim=True) * x.shape[-1]) + EPS)


class Layer(nn.Module):
    """Pre-norm softmax attention among real tokens and MLP: (B, L, C) to the same, at first the identity."""

    def __init__(self, dim: int, heads: int, ratio: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = RmsNorm(dim), RmsNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = Mlp(ratio, dim=dim)
        for last in (self.proj, self.mlp.project):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Tokens (B, L, C) and their mask (B, L), True at real tokens -> (B, L, C)."""
        x = x + self._attend(self.norm_attention(x), mask)
        return x + self.mlp(self.norm_mlp(x))

    def _attend(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, L, C / H) each
        out = softmax_attention(q, k, v, mask[:, None, None])
        return self.proj(out.transpose(1, 2).flatten(2))
