"""Frozen teachers of representation alignment: tokens of an extractor on the clean images, on the grid of the DiT."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from sana_lab.config import specs
from sana_lab.config.specs import Spec, SpecError
from sana_lab.methods import Grid, Model, Step

Fit = Literal["pool", "interpolate", "exact"]
"""Grids that differ: mean over cells of the finer one, the teacher's tokens interpolated to the DiT's, or refused."""


class Teacher:
    """An extractor, by its spec, as the teacher of a model.

    SpecError if its tokens do not fit the grid of a batch: of squares, or of an aspect-ratio bucket.
    """

    def __init__(self, spec: Spec, fit: Fit, model: Model, method: str) -> None:
        resolved = specs.resolve("extractor", spec)
        if resolved.get("device") == "auto":
            resolved["device"] = str(model.device)
        with torch.device("cpu"):  # real weights, also where the model is on the meta device
            self.extractor: Any = specs.build("extractor", resolved)
            grids = {shape: self._grid(shape) for shape in model.grids}
        self.dim: int = self.extractor.dim
        self.fit, self.name = fit, f"method {method!r}: teacher {resolved['name']!r}"
        self.common = [self._common(grids[shape], model.grids[shape], _bucket(shape)) for shape in model.grids]

    def targets(self, step: Step) -> Tensor:
        """Tokens (B', h, w, dim) of the step's images in float32, without gradient, on the grid that they have in
        common with those of the DiT, for `aligned`."""
        pixels = step.images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
        device = step.latents.device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            tokens = self.extractor.tokens(pixels).to(device, torch.float32)
            grid = self._common(tuple(tokens.shape[1:3]), step.grid)
            tokens = interpolated(tokens, grid) if self.fit == "interpolate" else pooled(tokens, grid)
        return step.repeated(tokens)

    def _grid(self, shape: tuple[int, int]) -> Grid:
        """Its tokens of images of (height, width) pixels."""
        h, w = self.extractor.tokens(torch.zeros(1, 3, *shape, dtype=torch.uint8)).shape[1:3]
        return h, w

    def _common(self, teacher: Grid, model: Grid, bucket: str = "") -> Grid:
        return common_grid(teacher, model, self.fit, self.name + bucket)


def _bucket(shape: tuple[int, int]) -> str:
    """Words for the bucket that a message is about; none for squares."""
    return f", in the aspect-ratio bucket of {_words(shape)} pixels," if shape[0] != shape[1] else ""


def common_grid(teacher: Grid, model: Grid, fit: Fit, what: str) -> Grid:
    """The grid on which both are compared. SpecError with the grids or options that would fit."""
    if teacher == model:
        return model
    if fit == "interpolate":
        if teacher != (1, 1):
            return model
        hint = "one token for an image cannot be interpolated; expected fit: pool"
    elif fit == "exact":
        hint = "expected the same grid, or fit: pool or interpolate"
    else:
        coarse = (min(teacher[0], model[0]), min(teacher[1], model[1]))
        if all(side % c == 0 for grid in (teacher, model) for side, c in zip(grid, coarse, strict=True)):
            return coarse
        near = max(1, round(teacher[0] / model[0])) * model[0]
        sides = f"sides that divide, such as {near} x {near} (option size of some teachers), or "
        hint = f"expected {sides if model[0] == model[1] else ''}fit: interpolate"
    raise SpecError(f"{what} has {_words(teacher)} tokens, and the DiT {_words(model)}; {hint}")


def pooled(tokens: Tensor, grid: Grid) -> Tensor:
    """Means of (B, h, w, C) over equal cells, (B, *grid, C)."""
    (h, w), (b, height, width, c) = grid, tokens.shape
    return tokens.reshape(b, h, height // h, w, width // w, c).mean((2, 4))


def interpolated(tokens: Tensor, grid: Grid) -> Tensor:
    """(B, h, w, C) interpolated to (B, *grid, C), bilinear and antialiased."""
    resized = F.interpolate(tokens.movedim(-1, 1), grid, mode="bilinear", align_corners=False, antialias=True)
    return resized.movedim(1, -1)


def aligned(tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean cosine of the DiT's tokens (B, h, w, D) with targets on the same grid or a coarser one, in float32."""
    h, w = targets.shape[1:3]
    return cosine(pooled(tokens, (h, w)), targets)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Mean cosine of tokens (B, h, w, D), in float32."""
    return F.cosine_similarity(a.float(), b.float(), dim=-1).mean()


def _words(grid: Grid) -> str:
    return f"{grid[0]} x {grid[1]}"
