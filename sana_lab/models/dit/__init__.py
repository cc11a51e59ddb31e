"""Interface of the denoisers: `Dit` for training, (x_t, t, text) -> velocity, and `SamplingDit` for sampling."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from sana_lab.ops.transfer import to_device
from sana_lab.types import Text

BlockCall = Callable[..., Tensor]
"""A block as it is called: tokens (B, h, w, width) and conditions -> tokens."""

Mixing = Callable[[Any, Tensor, int], Tensor]
"""(self-attention of a block, tokens (B, h, w, width), rows of each copy) -> tokens, in place of the self-attention."""

Reading = Callable[..., Tensor]
"""(cross-attention of a block, tokens (B, h, w, width), keys, values, mask, constant) -> tokens, in place of it."""

Quantize = Literal["none", "int8", "w8a8", "fp8", "fp8_simulated", "int4_simulated", "nvfp4_simulated"]


class Dit(nn.Module, ABC):
    """A diffusion transformer on latents (B, channels, h, w), sides multiples of `patch`, and text (B, L, text_dim)."""

    channels: int
    text_dim: int
    patch: int
    distilled: bool = False  # whether it reads the scale of guidance (guidance distillation, arXiv 2210.03142)
    mean_velocity: bool = False  # whether it reads intervals, over which its output is the mean velocity (MeanFlow)
    quantized: str = "none"  # precision of the weights and products of its blocks (`Sampling.precision`)
    spec: dict[str, Any]  # resolved spec that it was built from

    width: int | None = None
    """Width of the tokens (B, h, w, width) between its `blocks`, for training methods; None if it offers no hidden
    states. A DiT that sets it calls each block as `self.call(block, tokens, ...)`."""
    blocks: Any  # nn.ModuleList of the blocks, in order, of a DiT with `width`
    around: Callable[..., Tensor] | None = None
    """(run, block, tokens, ...) -> tokens, in place of run(block, tokens, ...) in a training step with methods."""

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, text: Text, guidance: Tensor | None = None) -> Tensor:
        """Noisy latents (B, C, h, w) at times t (B,) in [0, 1] (1 is noise) -> velocity (B, C, h, w).

        A DiT with `mean_velocity` also takes t (B, 2), intervals from t[:, 0] down to t[:, 1], and gives the mean
        velocity over each (arXiv 2505.13447). Times may be on the CPU and latents on a GPU. `guidance` (B,), such as
        4.5, is required by guidance-distilled models and None for all others.
        """

    def call(self, block: nn.Module, *arguments: Tensor | None) -> Tensor:
        """Output (B, h, w, width) of a block; in a training step with methods, what they make of it."""
        return self.run(block, *arguments) if self.around is None else self.around(self.run, block, *arguments)

    def run(self, block: BlockCall, *arguments: Tensor | None) -> Tensor:
        """Run a block or what methods put in its place; to override for activation checkpointing."""
        return block(*arguments)

    def shards(self) -> Iterable[nn.Module]:
        """The modules that `trainer.strategy: fsdp2` gathers one by one, each called as a whole: by default the blocks.
        All other parameters are gathered for a whole pass. A method `keys_values` may be called beside `forward`."""
        return self.blocks if self.width is not None else ()

    def prepare(
        self, text: Text, times: Tensor | None = None, masked: bool = True, guidance: float | None = None
    ) -> "SamplingDit":
        """Denoiser of one batch of captions, with everything that is constant across steps precomputed.

        `times` (M,) are the sampling times known in advance. `masked=False` asserts that `text.mask` is all True.
        `guidance` is the scale that a distilled model reads.
        """
        return TextDit(self, text, guidance)

    def without_guidance(self, x: Tensor, t: Tensor, text: Text) -> Tensor:
        """`forward` as one evaluation of any model: a distilled one reads the scale 1."""
        return self(x, t, text, self.guidance_input(x))

    def guidance_input(self, x: Tensor, scale: float = 1.0) -> Tensor | None:
        """The input `guidance` (B,) of `forward` for latents x (B, C, h, w); None if the model reads none."""
        return torch.full((len(x),), scale, device=x.device) if self.distilled else None


class SamplingDit(ABC):
    """A denoiser and a batch of captions: (x, t) -> velocity, in the dtype of x.

    It owns the state kept between sampling steps. A step has two parts, so that the second can be captured in a CUDA
    graph: `step_inputs` of the times, and `step`, which reads only the latents, these inputs, the kept `tensors` and
    the weights.
    """

    dit: Dit

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.step(x, self.step_inputs(t))

    @abstractmethod
    def step_inputs(self, t: Tensor) -> Sequence[Tensor]:
        """Inputs of a step that depend on its times (B,), on the network's device."""

    @abstractmethod
    def step(self, x: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """Velocity (B, C, h, w) of latents (B, C, h, w)."""

    @property
    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """The kept tensors that depend on the captions."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens of a caption, padding included."""

    @property
    def variant(self) -> Hashable:
        """What its step computes otherwise than that of another model with tensors of the same layout."""
        return None

    @abstractmethod
    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Copy with a function applied to each of `tensors`."""

    @abstractmethod
    def padded(self, length: int) -> Self:
        """Copy with captions right-padded to `length` tokens."""

    @abstractmethod
    def beside(self, other: Self) -> Self:
        """Concatenate the other's captions (one for all rows, or as many) after these in one batch."""

    def repeat(self, copies: int) -> Self:
        """Copy with each caption repeated `copies` times in succession."""
        return self.map(lambda x: x.repeat_interleave(copies, 0))


class Blockwise(SamplingDit):
    """A denoiser whose blocks run in ranges, for step caches (`diffusion.step_cache`), and with other attention in some
    of them. Tokens are (B, h, w, C)."""

    copies: int
    """Rows of an image in a batch: its prompt's, and after all of those its null text's if there is one; `twice` puts
    another row of the prompt before them."""

    @abstractmethod
    def embed(self, x: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> tokens before the first block."""

    @abstractmethod
    def modulated(self, tokens: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """Input (B, h, w, C) of the first block's attention."""

    @abstractmethod
    def run(self, tokens: Tensor, inputs: Sequence[Tensor], start: int = 0, stop: int | None = None) -> Tensor:
        """Tokens after the blocks from `start` to before `stop`; None is to the last."""

    @abstractmethod
    def project(self, tokens: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """Tokens after the last block -> velocity (B, C, h, w)."""

    @abstractmethod
    def twice(self) -> Self:
        """Copy with all captions twice, the second time after all of the first; before a null text is put beside."""

    @abstractmethod
    def replacing(self, mixing: Mapping[int, Mixing]) -> Self:
        """Copy that calls these in place of the self-attention of some blocks, by index; of the others as before."""

    @abstractmethod
    def also_reading(self, other: Self, owners: Sequence[int], weights: Tensor) -> Self:
        """Copy of which the picture `owners[i]` also reads row i of the other's captions by cross-attention, at each
        token with a weight of `weights` (K, h, w, 1) beside 1 - weight of its own caption."""

    @abstractmethod
    def select(self, rows: Tensor) -> Self:
        """Copy for these rows (K,) of the batch alone, which are all those of some images."""

    @abstractmethod
    def selected_inputs(self, inputs: Sequence[Tensor], rows: Tensor) -> Sequence[Tensor]:
        """The inputs of a step for these rows."""


class TextDit(SamplingDit):
    """`SamplingDit` of a `Dit` without precomputation: the network and its text."""

    def __init__(self, dit: Dit, text: Text, guidance: float | None = None) -> None:
        self.dit, self.text, self.guidance = dit, text, guidance

    def step_inputs(self, t: Tensor) -> list[Tensor]:
        return [to_device(t, self.text.tokens.device)]

    def step(self, x: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        scale = None if self.guidance is None else self.dit.guidance_input(x, self.guidance)
        return self.dit(x, inputs[0], self.text, scale).to(x.dtype)

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.text]

    @property
    def length(self) -> int:
        return self.text.tokens.shape[1]

    def map(self, function: Callable[[Tensor], Tensor]) -> "TextDit":
        return TextDit(self.dit, Text(*map(function, self.text)), self.guidance)

    def padded(self, length: int) -> "TextDit":
        return TextDit(self.dit, self.text.padded(length), self.guidance)

    def beside(self, other: "TextDit") -> "TextDit":
        return TextDit(self.dit, self.text.beside(other.text), self.guidance)
