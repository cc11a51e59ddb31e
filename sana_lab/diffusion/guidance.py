"""Classifier-free guidance (arXiv 2207.12598) as one batched forward."""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from sana_lab.models.dit import Dit, Prepared
from sana_lab.types import Text, Velocity

SLIP = 1e-6
"""What float32 may take from a time at an interval's end."""


Step = Callable[[Tensor, Tensor, Prepared], Tensor]
"""(x, t, prepared) -> velocity, by nothing but its arguments and the denoiser's weights."""

Bind = Callable[[Step, Prepared, Hashable], Velocity]
"""Makes the velocity of a step and a text; steps of one kind, the last argument, do the same with the same weights."""


def at_once(step: Step, prepared: Prepared, kind: Hashable) -> Velocity:
    """The step itself."""
    return lambda x, t: step(x, t, prepared)


def guided(
    dit: Dit,
    text: Text,
    null: Text,
    scale: float,
    interval: tuple[float, float] | None = None,
    times: Tensor | None = None,
    bind: Bind = at_once,
) -> Velocity:
    """null + scale (text - null), with captions prepared once; a scale of 1 runs the conditional half alone.

    So do times outside `interval`, where it is given (arXiv 2404.07724). Guided is in the dtype of x, whatever the
    network's: float32 latents stay so through a network in half precision. `times` (M,) are those that it will be asked
    for, as far as they are known: what depends on them alone is computed here, all at once. `bind` is how steps are
    run: as they are, or recorded (`systems.graphs`).
    """
    alone = prepare(dit, text)._replace(schedule=None if times is None else dit.schedule(times))

    def one(x: Tensor, t: Tensor, prepared: Prepared) -> Tensor:
        return dit(x, t, prepared).to(x.dtype)

    def two(x: Tensor, t: Tensor, prepared: Prepared) -> Tensor:
        with_text, without = dit(torch.cat([x, x]), torch.cat([t, t]), prepared).to(x.dtype).chunk(2)
        return without + scale * (with_text - without)

    if scale == 1:
        return bind(one, alone, "alone")
    inside = bind(two, pair(dit, alone, null), scale)
    return inside if interval is None else _within(interval, inside, bind(one, alone, "alone"))


def prepare(dit: Dit, text: Text) -> Prepared:
    """The caption, prepared without padding that no row needs, and without a mask where no padding is left."""
    text = trim(text)
    prepared = dit.prepare(text)
    return prepared._replace(mask=None) if bool(text.mask.all()) else prepared


def pair(dit: Dit, prepared: Prepared, null: Text) -> Prepared:
    """The null text's rows (one for all, or one each) after the prepared ones; if it is one token, as a constant.

    That half's cross-attention then needs no queries, no keys and no projections.
    """
    other = prepare(dit, null)
    constant = dit.constant(other) if other.mask is None and other.size[1] == 1 else None
    if constant is None:
        return prepared.beside(other)
    return prepared._replace(constant=[c.expand(prepared.size[0], -1) for c in constant])


def _within(interval: tuple[float, float], inside: Velocity, outside: Velocity) -> Velocity:
    """One velocity within an interval of times and another outside; all rows of x have one time."""
    return lambda x, t: (inside if within(interval, t[0].item()) else outside)(x, t)


def within(interval: tuple[float, float], t: float) -> bool:
    """Whether a time lies in an interval, its ends included."""
    return interval[0] - SLIP <= t <= interval[1] + SLIP


def trim(text: Text) -> Text:
    """Without the positions that are padding in every row."""
    used = text.mask.any(0)
    return text if bool(used.all()) else Text(text.tokens[:, used], text.mask[:, used])


def join(a: Text, b: Text) -> Text:
    """Two texts on one batch axis; b (one row or as many as a) is repeated and both are padded to one length."""
    rows, length = a.tokens.shape[0], max(a.tokens.shape[1], b.tokens.shape[1])
    if b.tokens.shape[0] == 1:
        b = Text(b.tokens.expand(rows, -1, -1), b.mask.expand(rows, -1))
    a, b = pad(a, length), pad(b, length)
    return Text(torch.cat([a.tokens, b.tokens]), torch.cat([a.mask, b.mask]))


def pad(text: Text, length: int) -> Text:
    """Right-padded with zeros to `length` tokens."""
    extra = length - text.tokens.shape[1]
    tokens = torch.nn.functional.pad(text.tokens, (0, 0, 0, extra))
    return Text(tokens, torch.nn.functional.pad(text.mask, (0, extra)))
