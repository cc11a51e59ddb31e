"""Contract of attentions and feed-forward layers: tokens (B, h, w, C) to tokens (B, h, w, C)."""

import torch
from torch import Tensor

from sana_lab.contracts import (
    Rule,
    Subject,
    expect,
    expect_close,
    expect_gradients,
    expect_meta,
    expect_round_trip,
    expect_shape,
)


def _tokens(subject: Subject, *grid: int, images: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(images, *grid, subject.supplied["dim"], generator=generator)


@torch.no_grad()
def keeps_shape(subject: Subject) -> None:
    """Tokens (B, h, w, C) keep their shape, on any grid."""
    layer = subject.make()
    for grid in ((1, 1), (4, 4), (3, 5)):
        x = _tokens(subject, *grid)
        expect_shape(layer(x), tuple(x.shape), f"the output for tokens {tuple(x.shape)}")


def gradients(subject: Subject) -> None:
    """Every parameter gets a finite gradient."""
    layer = subject.make().train()
    expect_gradients(layer, layer(_tokens(subject, 3, 4).requires_grad_().clone()))


@torch.no_grad()
def images_are_independent(subject: Subject) -> None:
    """The result of an image does not depend on the others of its batch."""
    layer, x = subject.make(), _tokens(subject, 3, 4, images=3)
    expect_close(layer(x)[1:2], layer(x[1:2]), "an image alone and in a batch differ")


@torch.no_grad()
def input_is_left_alone(subject: Subject) -> None:
    """The input is not changed in place, and the result is the same twice."""
    layer, x = subject.make(), _tokens(subject, 3, 4)
    before = x.clone()
    first = layer(x)
    expect(torch.equal(x, before), "the input was changed in place")
    expect_close(layer(x), first, "two calls in evaluation mode differ")


@torch.no_grad()
def keeps_dtype(subject: Subject) -> None:
    """In bfloat16 the output is bfloat16 and finite."""
    layer, x = subject.make().bfloat16(), _tokens(subject, 4, 4).bfloat16()
    out = layer(x)
    expect(out.dtype == torch.bfloat16, f"tokens in bfloat16 give {str(out.dtype).removeprefix('torch.')}")
    expect_shape(out, tuple(x.shape), "the output in bfloat16")


def round_trip(subject: Subject) -> None:
    """Weights load into another instance."""
    expect_round_trip(subject, lambda layer: layer(_tokens(subject, 3, 4)))


def meta(subject: Subject) -> None:
    """It can be built without memory (meta device)."""
    expect_meta(subject)


RULES: tuple[Rule, ...] = (
    meta,
    keeps_shape,
    gradients,
    images_are_independent,
    input_is_left_alone,
    keeps_dtype,
    round_trip,
)
