"""Interface of training methods: loss terms beside the objective's, modules that train with them, token routing.

A method is one option of a system (`system.method`, a spec or a list of specs). It is built when training begins and is
in no exported weights; several combine.
"""

from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sana_lab.config.specs import Spec, SpecError
from sana_lab.models.dit import BlockCall, Dit
from sana_lab.models.text import TextEncoder
from sana_lab.types import WHOLE, Batch, Part, Text

Grid = tuple[int, int]
"""Rows and columns (h, w) of tokens."""


class Model(NamedTuple):
    """The model that methods train with, known before training."""

    dit: Dit
    size: int  # pixels a side of the training images, squares if there are no buckets
    grid: Grid  # tokens of their latents
    batch: int | None = None  # items of a batch; None if unknown
    images: bool = True  # whether a step has images, for `Step.images`
    device: torch.device = torch.device("cpu")  # where training runs
    text_trains: bool = False  # whether the text encoder trains too
    frozen: Callable[..., Any] | None = None  # (kind, spec, **supplied) -> frozen part with its weights, of a teacher
    buckets: Sequence[tuple[int, int]] = ()  # (height, width) in pixels of batches in aspect-ratio buckets; () is none

    @property
    def grids(self) -> dict[tuple[int, int], Grid]:
        """Tokens (h, w) by (height, width) in pixels of the images of a batch: the square, and each bucket."""
        unit = self.size // self.grid[0]
        buckets = {(height, width): (height // unit, width // unit) for height, width in self.buckets}
        return {(self.size, self.size): self.grid} | buckets

    @property
    def depth(self) -> int:
        """Number of blocks whose hidden states methods may use; 0 if the DiT offers none."""
        return 0 if self.dit.width is None else len(self.dit.blocks)

    @property
    def width(self) -> int:
        """Width of the hidden states. SpecError for a DiT that offers none."""
        if self.dit.width is None:
            raise SpecError(
                f"dit {type(self.dit).__name__} offers no hidden states; expected one with `width` and `call`"
            )
        return self.dit.width

    def teacher(self, spec: Spec, name: str, text: TextEncoder | None = None) -> Dit:
        """The frozen DiT of a spec, for method `name`; it reads the features of `text`, or of the model's text encoder.
        SpecError if that one trains."""
        if self.text_trains and text is None:
            raise SpecError(
                f"method {name!r} has a teacher, which reads the features of the text encoder, and that trains too; "
                "expected system.train_text: false with the teacher's text encoder, or distill with its text_encoder"
            )
        assert self.frozen is not None
        text_dim = self.dit.text_dim if text is None else text.dim
        dit: Dit = self.frozen("dit", spec, channels=self.dit.channels, text_dim=text_dim)
        return dit

    def text_teacher(self, spec: Spec) -> TextEncoder:
        """The frozen text encoder of a spec, for a teacher that does not read the model's."""
        assert self.frozen is not None
        encoder: TextEncoder = self.frozen("text_encoder", spec)
        return encoder

    def block(self, index: int | None, share: float, name: str) -> int:
        """A checked index of a block, from 0; None is the block at this share of the depth. SpecError."""
        assert self.width
        if index is None:
            return max(0, round(share * self.depth) - 1)
        if not 0 <= index < self.depth:
            raise SpecError(f"method {name!r} uses block {index}, and the DiT has blocks 0 to {self.depth - 1}")
        return index


@dataclass
class Step:
    """One training step. Rows B' are `draws` times those of the batch, each item's in succession.

    `begin` of a method may replace `times`, `ends`, `target` and `weigh`, before the forward pass.
    """

    batch: Batch
    text: Text  # of the B items
    latents: Tensor  # (B', C, h, w), clean
    noise: Tensor  # (B', C, h, w)
    times: Tensor  # (B',) in [0, 1], 1 is noise
    target: Tensor  # (B', C, h, w): velocity, or noise with objective ddpm
    random: torch.Generator  # of this step, for `uniform`
    pixels: Callable[[], Tensor]  # images of the B items
    draws: int = 1
    part: Part = WHOLE
    prediction: Tensor = field(default_factory=lambda: torch.empty(0))  # of the target, once the DiT has run
    hidden: dict[int, Tensor] = field(default_factory=dict)  # block -> output (B', h, w, width) on the whole grid
    ends: Tensor | None = None  # (B',) ends of intervals from `times` down, over which velocities are means
    weigh: Callable[[Tensor], Tensor] | None = None  # squared errors (B',) -> factors of them
    null: Callable[[], Text] | None = None  # features of the empty prompt, for one row or for the B items
    dropped: Sequence[bool] = ()  # of the B items: whether `text` is the empty prompt's; () is none
    patch: int = 1  # latents a side of a token

    @property
    def grid(self) -> Grid:
        """Tokens of the batch, whose images need not be squares."""
        h, w = self.latents.shape[2:]
        return h // self.patch, w // self.patch

    @cached_property
    def images(self) -> Tensor:
        """(B, 3, H, W) in [-1, 1]: the batch's, or decoded from its latents."""
        return self.pixels()

    def of_rows(self, text: Text, rows: Tensor) -> Text:
        """The text, of one row or of the B items, for some rows of the step."""
        items = rows.to(text.mask.device) // self.draws
        return Text(*(x.expand(len(x), *x.shape[1:])[items if len(x) > 1 else items * 0] for x in text))

    def repeated(self, x: Tensor) -> Tensor:
        """Rows (B, ...) of the batch as the rows (B', ...) of the step."""
        return x if self.draws == 1 else x.repeat_interleave(self.draws, 0)

    def uniform(self, *shape: int) -> Tensor:
        """Random numbers (B', *shape) in [0, 1) on the CPU, the same for one device and for several."""
        return self.part.draw(lambda n: torch.rand(n, *shape, generator=self.random), len(self.latents))


class Method(nn.Module, ABC):
    """A training method. A subclass implements `losses`, `wrap` or both; its constructor takes its options.

    Its parameters train with the system's optimiser; they are in checkpoints, but in no average and no weights file.
    """

    name: str = ""
    """Name of its loss term, distinct among the methods of a system; set by the lab before `build`."""

    weight: float = 1.0
    """Factor of its terms in the loss; they are logged without it."""

    blocks: Sequence[int] = ()
    """Blocks whose hidden states `losses` reads; set at the latest in `build`."""

    lr: float | None = None
    """Learning rate of its parameters; None is that of the optimiser."""

    divisible: bool = True
    """Whether its terms are means over the items of a batch, so that several devices may each train on a part of it."""

    replaces_target: bool = False
    """Whether its `begin` replaces `Step.target`, which one method of a system may do."""

    velocities: bool = False
    """Whether the network has to predict the velocity of a flow."""

    needs_images: bool = False
    """Whether `losses` reads `Step.images`."""

    def build(self, model: Model) -> None:
        """Create what depends on the model, and check that the method fits it. SpecError."""

    def check_sampling(self, sampling: Mapping[str, Any]) -> None:
        """SpecError for an experiment's options of sampling that do not fit what it trains."""
        return

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        """Scalar terms by name, logged as train/NAME; the step has its prediction and hidden states."""
        return {}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups of its parameters with options of their own, here their learning rate; the others are stepped as
        those of the model."""
        return [] if self.lr is None else [{"params": [*self.parameters()], "lr": self.lr}]

    def begin(self, step: Step) -> None:
        """Prepare the forward pass of a step, such as by random numbers or other times and targets."""

    def wrap(self, index: int, call: BlockCall, block: nn.Module) -> BlockCall:
        """What runs in place of `call`, block `index` or what another method made of it, in a step's forward pass.

        It may run a second time in the backward pass (activation checkpointing), with the same result.
        """
        return call

    def whole(self, index: int, tokens: Tensor) -> Tensor:
        """Output (B', h, w, width) on the whole grid of a block that this method's `wrap` changes."""
        return tokens

    def end(self) -> None:
        """Forget what `begin` prepared."""

    @property
    def changes_forward(self) -> bool:
        """Whether it changes the forward pass."""
        return type(self).wrap is not Method.wrap
