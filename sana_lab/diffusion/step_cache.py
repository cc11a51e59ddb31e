"""Step caches: reuse of the blocks' output of an earlier step where this step's would hardly differ.

An approximation, and a tier of its own in tables. The blocks change the tokens by a residual; an image that reuses it
runs none of the remaining blocks. The decision is made for each image by itself, so that it does not depend on the
other images of the batch; a guided image's two rows decide together.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from sana_lab.config.ranges import Nonnegative
from sana_lab.config.specs import SpecError
from sana_lab.models.dit import Blockwise, SamplingDit


class StepCache(ABC):
    """The signal that is compared between steps, and the change of it from which on an image is computed again.

    Change is the mean absolute difference over the mean magnitude (relative L1). Threshold 0 computes every step.
    """

    accumulates: bool
    """Whether changes between successive steps add up; else the change is that since the last computed step."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    @abstractmethod
    def start(self, model: Blockwise, tokens: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, int]:
        """Signal (B, h, w, C), tokens (B, h, w, C), and the number of blocks that these tokens have passed."""


@final
class FirstBlockCache(StepCache):
    """First-block cache (FBCache): the first block always runs, and the change of its residual decides."""

    accumulates = False

    def __init__(
        self,
        threshold: Nonnegative = 0.1,  # relative change of the first block's residual that has an image computed again
    ) -> None:
        super().__init__(threshold)

    def start(self, model: Blockwise, tokens: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, int]:
        after = model.run(tokens, inputs, 0, 1)
        return after - tokens, after, 1


@final
class TeaCache(StepCache):
    """TeaCache (arXiv 2411.19108) without its fitted polynomial: the input of the first block's attention decides."""

    accumulates = True

    def __init__(
        self,
        threshold: Nonnegative = 0.1,  # sum of relative changes, step by step, that has an image computed again
    ) -> None:
        super().__init__(threshold)

    def start(self, model: Blockwise, tokens: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, int]:
        return model.modulated(tokens, inputs), tokens, 0


class CachedSteps:
    """The velocity of one batch of captions under a step cache, and what it keeps between steps.

    SpecError for a denoiser that cannot run its blocks apart.
    """

    def __init__(self, cache: StepCache, model: SamplingDit) -> None:
        if not isinstance(model, Blockwise):
            raise SpecError(
                f"sampling.cache needs a denoiser of blocks, and {type(model.dit).__name__} is none; expected null"
            )
        self.cache, self.model = cache, model
        self.signal: Tensor | None = None  # (B, h, w, C) that this step's is compared with
        self.total: Tensor | None = None  # (images,) changes since each image's last computed step
        self.residual: Tensor | None = None  # (B, h, w, C) change of the tokens by the remaining blocks

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Velocity (B, C, h, w) of latents (B, C, h, w) at times t (B,)."""
        inputs = self.model.step_inputs(t)
        signal, tokens, passed = self.cache.start(self.model, self.model.embed(x), inputs)
        compute = self._compute(signal)  # (images,) on the host
        if compute.all():
            out = self.model.run(tokens, inputs, passed)
            self.signal, self.residual = signal, out - tokens
        else:
            out = self._reuse(signal, tokens, inputs, passed, compute)
        return self.model.project(out, inputs).to(x.dtype)

    def _compute(self, signal: Tensor) -> Tensor:
        """Which images run all blocks: all in the first step, then those whose signal has changed enough."""
        images = len(signal) // self.model.copies
        if self.signal is None or self.total is None:
            self.total = torch.zeros(images)
            return torch.ones(images, dtype=torch.bool)
        change = relative_change(signal, self.signal, self.model.copies).cpu()
        self.total = self.total + change if self.cache.accumulates else change
        compute = ~(self.total < self.cache.threshold)
        self.total = torch.where(compute, 0.0, self.total)
        return compute

    def _reuse(self, signal: Tensor, tokens: Tensor, inputs: Sequence[Tensor], passed: int, compute: Tensor) -> Tensor:
        """Tokens after the last block, of which only the images to `compute` run the remaining ones."""
        assert self.residual is not None
        assert self.signal is not None
        rows = compute.repeat(self.model.copies).nonzero().flatten().to(tokens.device)
        if self.cache.accumulates:
            self.signal = signal
        out = tokens + self.residual
        if len(rows):
            part = self.model.select(rows)
            computed = part.run(tokens[rows], part.selected_inputs(inputs, rows), passed)
            out[rows] = computed
            self.residual = self.residual.index_copy(0, rows, computed - tokens[rows])
            self.signal = self.signal.index_copy(0, rows, signal[rows])
        return out


def relative_change(signal: Tensor, reference: Tensor, copies: int) -> Tensor:
    """(images,) in float32: mean |signal - reference| over mean |reference| of an image's `copies` rows."""
    wide = torch.promote_types(signal.dtype, torch.float32)
    difference, size = (
        x.to(wide).abs().flatten(1).mean(1).unflatten(0, (copies, -1)).sum(0) for x in (signal - reference, reference)
    )
    return (difference / size.clamp(min=torch.finfo(wide).tiny)).float()
