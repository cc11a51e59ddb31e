"""The records that cross borders between packages."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x_t, t) -> dx/dt; x_t is (B, C, h, w), t is (B,) in [0, 1] and 1 is noise; a solver's t lies on the host."""


class Text(NamedTuple):
    """Encoded prompts."""

    tokens: Tensor  # (B, L, D)
    mask: Tensor  # (B, L) bool, True at real tokens


class Batch(NamedTuple):
    """What a data module yields: images, or the latents an autoencoder made of them, with one caption each."""

    images: Tensor | None  # (B, 3, H, W) in [-1, 1]
    prompts: list[str]  # B captions
    latents: Tensor | None = None  # (B, C, h, w), normalised
    text: Text | None = None  # cached features, when the text encoder is frozen
    null: Text | None = None  # with them, those of the empty prompt (1, L, D), for text dropout


class Object(NamedTuple):
    """One thing that a detector saw, or that a scene holds; GenEval's unit of evidence."""

    label: str  # class name: "circle", or a COCO class
    box: tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels
    score: float = 1.0  # confidence; higher is looked at first
    color: str | None = None  # one of the ten GenEval colours, or None where it was not judged
    mask: Tensor | None = None  # (H, W) bool, True where it is; None where nothing but the box is known


Json = dict[str, Any]
"""Plain data: what YAML and JSON can hold."""
