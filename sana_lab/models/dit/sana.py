"""SANA's linear diffusion transformer (arXiv 2410.10629, section 2.2)."""

import math
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, cast, final

import torch
from torch import Tensor, nn

from sana_lab.config.ranges import Depth, Nonnegative, Positive, Real, Width
from sana_lab.config.specs import PATTERN, RUNTIME, AsBefore, Spec, build
from sana_lab.models.attention import layers, number
from sana_lab.models.dit import BlockCall, Dit, Reading
from sana_lab.models.dit.activation_checkpointing import Checkpointing, run
from sana_lab.models.dit.sana_sampling import SamplingSana, prepare
from sana_lab.models.layers import (
    CaptionEmbed,
    CrossAttention,
    MixFfn,
    PatchEmbed,
    TimeEmbed,
    sincos_positions,
    unpatch,
)
from sana_lab.ops.backend import Backend, forward_mode
from sana_lab.ops.modulate import add, add_modulate, modulate
from sana_lab.ops.transfer import to_device
from sana_lab.types import Text

INTERVAL_SCALE = 10.0
"""Factor on the length of intervals before embedding: few periods, as the derivative by time enters its own target."""


class Block(nn.Module):
    """Gated self-attention, ungated cross-attention without a norm, gated feed-forward; AdaLN-single modulates."""

    def __init__(
        self,
        dim: int,
        attention: Spec,
        ffn: Spec,
        cross_heads: int,
        cross_norm: bool,
        eps: float,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.backend: Backend = backend
        self.table = nn.Parameter(torch.randn(6, dim) / math.sqrt(dim))
        self.attention = build("attention", attention, dim=dim)
        self.cross = CrossAttention(dim, cross_heads, cross_norm, eps)
        self.ffn = build("ffn", ffn, dim=dim)

    def forward(
        self,
        x: Tensor,
        six: Tensor,
        *caption: Tensor | None,
        mixing: Callable[[Any, Tensor], Tensor] | None = None,
        reading: Reading | None = None,
    ) -> Tensor:
        """Tokens (B, h, w, C), AdaLN vectors (B, 6, C), and the caption arguments of `CrossAttention.forward`; `mixing`
        and `reading` run in place of the two attentions."""
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = six.unbind(1)
        normed = modulate(x, shift_a, scale_a, backend=self.backend)
        mixed = self.attention(normed) if mixing is None else mixing(self.attention, normed)
        x = add(x, mixed, gate_a, backend=self.backend)
        read = self.cross(x, *caption) if reading is None else reading(self.cross, x, *caption)
        x, normed = add_modulate(x, read, None, shift_f, scale_f, backend=self.backend)
        return add(x, self.ffn(normed), gate_f, backend=self.backend)


class Head(nn.Module):
    """Final norm, modulated by the time embedding, and projection to latent patches."""

    def __init__(self, dim: int, out: int, backend: Backend = "auto") -> None:
        super().__init__()
        self.backend: Backend = backend
        self.table = nn.Parameter(torch.randn(2, dim) / math.sqrt(dim))
        self.linear = nn.Linear(dim, out)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = (self.table + time[:, None]).unbind(1)
        return self.linear(modulate(x, shift, scale, backend=self.backend))


@final
class Sana(Dit):
    """SANA's DiT; the defaults are SANA-0.6B. `dim` 2240, `depth` 20, `cross_heads` 20 is SANA-1.6B."""

    def __init__(
        self,
        dim: Width = 1152,  # width of tokens; a multiple of the attention's head_dim and of cross_heads
        depth: Depth = 28,  # number of blocks
        patch: Width = 1,  # side of a patch, in cells of the latent grid
        # Mixer of tokens: one for all blocks, one for each, or a pattern that repeats, from the first block on.
        attention: Annotated[Spec | list[Spec], "attention", PATTERN] = "linear",
        ffn: Annotated[Spec, "ffn"] = "mix",  # feed-forward layer of each block
        cross_heads: Width = 16,  # heads of cross-attention
        cross_norm: bool = False,  # RMSNorm of q and k in cross-attention (SANA-1.5)
        caption_scale: Real = 0.01,  # initial weight of the caption's RMSNorm
        position: Literal["none", "sincos"] = "none",  # position embedding of patches; sincos in the 2K and 4K models
        base: Width = 32,  # tokens a side that the position embedding is defined for
        interpolation: Positive = 1.0,  # divides positions; 2 in the 4K model
        # Activations kept for the backward pass: false all, true the blocks' inputs, selective also matrix products.
        checkpointing: Annotated[Checkpointing, RUNTIME] = False,
        cross_norm_eps: Annotated[Positive, AsBefore(1e-6)] = 1e-6,  # 1e-6 in NVlabs' code, 1e-5 in diffusers'
        time_scale: Annotated[Positive, AsBefore(1000.0)] = 1000.0,  # factor on t before embedding; 1 in SANA-Sprint
        # Scale of the guidance input of guidance-distilled models (0.1 in SANA-Sprint); None has no guidance input.
        guidance: Annotated[Positive | None, AsBefore(None)] = None,
        # Zero the last layer at initialisation, as in DiT (arXiv 2212.09748) but not in SANA's released code.
        zero_head: Annotated[bool, AsBefore(False)] = False,
        # Read intervals of time as well, for mean velocities over them (method and solver meanflow). Their embedding
        # begins at zero, so that a parent's outputs are kept.
        mean_velocity: Annotated[bool, AsBefore(False)] = False,
        # Standard deviation, as a difference of times, of a Gaussian that smooths the sinusoid of t; bounds the
        # derivative of the output by t, which jitter of high frequencies dominates otherwise.
        time_smoothing: Annotated[Nonnegative, AsBefore(0.0)] = 0.0,
        # Kernels of norms, modulation and gates; do not change results. auto is Triton on CUDA, torch elsewhere.
        backend: Annotated[Literal["auto", "torch", "triton"], RUNTIME] = "auto",
        *,
        channels: int,
        text_dim: int,
    ) -> None:
        super().__init__()
        self.channels, self.text_dim, self.patch, self.checkpointing = channels, text_dim, patch, checkpointing
        self.distilled, self.mean_velocity = guidance is not None, mean_velocity
        self.position, self.base, self.interpolation, self.width = position, base, interpolation, dim
        self.positions: dict[tuple[Any, ...], Tensor] = {}
        self.patch_embed = PatchEmbed(channels, dim, patch)
        self.time_embed = TimeEmbed(dim, scale=time_scale, smoothing=time_smoothing)
        self.guidance_embed = None if guidance is None else TimeEmbed(dim, scale=guidance)
        self.time_block = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.caption_embed = CaptionEmbed(text_dim, dim, caption_scale)
        self.blocks: Any = nn.ModuleList(
            Block(dim, layer, ffn, cross_heads, cross_norm, cross_norm_eps, backend)
            for layer in layers(attention, depth)
        )
        mixers: list[Any] = [block.attention for block in self.blocks]
        number(mixers)
        self.head = Head(dim, patch * patch * channels, backend)
        self.interval_embed = TimeEmbed(dim, scale=INTERVAL_SCALE) if mean_velocity else None
        self.initialise()
        if zero_head:
            nn.init.zeros_(self.head.linear.weight)

    def initialise(self) -> None:
        """Xavier for linear layers, N(0, 0.02) for time and caption, PyTorch's default for Mix-FFN; no zeros."""
        mix_ffn = {m for ffn in self.modules() if isinstance(ffn, MixFfn) for m in ffn.modules()}
        for module in self.modules():
            if isinstance(module, nn.Linear) and module not in mix_ffn:
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))
        for part in (self.time_embed, self.time_block, self.caption_embed, self.guidance_embed, self.interval_embed):
            for module in part.modules() if part is not None else ():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02)
        if self.interval_embed is not None:
            nn.init.zeros_(cast(nn.Linear, self.interval_embed.mlp[-1]).weight)

    def forward(self, x: Tensor, t: Tensor, text: Text, guidance: Tensor | None = None) -> Tensor:
        """Embed patches, time and caption, run the blocks, project to the velocity (SANA, figure of the DiT)."""
        time, six = self.modulation(t, guidance)  # (B, C) and (B, 6, C): AdaLN-single, shared by all blocks
        caption = self.caption_embed(text.tokens)  # (B, L, C)
        x = self.embed(x)  # (B, h, w, C)
        for block in self.blocks:
            keys, values = block.cross.keys_values(caption)
            x = self.call(block, x, block.table + six, keys, values, text.mask)
        return unpatch(self.head(x, time), self.patch)  # (B, channels, h p, w p)

    def modulation(self, t: Tensor, guidance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Time embedding (B, C) of times (B,) or intervals (B, 2), and six AdaLN vectors (B, 6, C), to which each block
        adds its table."""
        time = self.embed_time(to_device(t, self.head.table.device), guidance)
        return time, self.time_block(time).unflatten(-1, (6, -1))

    def prepare(
        self, text: Text, times: Tensor | None = None, masked: bool = True, guidance: float | None = None
    ) -> SamplingSana:
        return prepare(self, text, times, masked, guidance)

    def embed_time(self, t: Tensor, guidance: Tensor | None) -> Tensor:
        """Times (B,) or intervals (B, 2) and, in a distilled model, guidance (B,) -> (B, dim)."""
        embedded = self._embed_interval(t)
        if self.guidance_embed is None:
            if guidance is not None:
                raise ValueError("guidance was given, but this DiT was not distilled with it; expected none")
            return embedded
        if guidance is None:
            raise ValueError("this DiT was distilled with guidance; expected guidance (B,), such as 4.5 for each image")
        return embedded + self.guidance_embed(guidance)

    def _embed_interval(self, t: Tensor) -> Tensor:
        """Times (B,), as intervals that begin and end there, or intervals (B, 2) -> (B, dim)."""
        if self.interval_embed is None:
            if t.ndim == 2:
                raise ValueError("intervals of time were given, which this DiT does not read; expected times (B,)")
            return self.time_embed(t)
        start, end = t.unbind(-1) if t.ndim == 2 else (t, t)
        return self.time_embed(start) + self.interval_embed(start - end)

    def embed(self, x: Tensor) -> Tensor:
        """Latents (B, C, h p, w p) -> tokens (B, h, w, dim), with the position embedding if there is one."""
        if x.shape[-2] % self.patch or x.shape[-1] % self.patch:
            raise ValueError(f"latents of {x.shape[-2]}x{x.shape[-1]} do not divide into patches of {self.patch}")
        x = self.patch_embed(x.to(self.patch_embed.proj.weight.dtype))
        if self.position == "sincos":
            x = x + self._positions(x)
        return x

    def _positions(self, x: Tensor) -> Tensor:
        """Position embedding (h, w, dim) of tokens (B, h, w, dim); that of the last grid is stored."""
        h, w, dim = x.shape[1:]
        key = (h, w, x.dtype, x.device)
        if key in self.positions:
            return self.positions[key]
        positions = sincos_positions(h, w, dim, self.base, self.interpolation, x.device).to(x.dtype)
        if type(x) is Tensor and not torch.compiler.is_compiling() and not forward_mode():  # else of no use later
            self.positions = {key: positions}
        return positions

    def shards(self) -> Iterable[nn.Module]:
        """The layers of the blocks: `forward` reads a block's table and its caption's keys outside the block."""
        return (layer for block in self.blocks for layer in (block.attention, block.cross, block.ffn))

    def run(self, block: BlockCall, *arguments: Tensor | None) -> Tensor:
        """Run a block, with activation checkpointing in training."""
        return run(block, self.training and self.checkpointing, *arguments)
