"""Classifier-free guidance (arXiv 2207.12598) as one batched forward."""

from collections.abc import Callable

import torch
from torch import Tensor

from sana_lab.models.dit import Dit, SamplingDit
from sana_lab.types import Text, Velocity

TIME_TOLERANCE = 1e-6
"""Rounding of a float32 time at the end of an interval."""

Bind = Callable[[SamplingDit], Velocity]
"""How a denoiser's steps are run: as they are, or recorded and replayed (`systems.cuda_graphs`)."""


def guided(
    dit: Dit,
    text: Text,
    null: Text,
    scale: float,
    interval: tuple[float, float] | None = None,
    times: Tensor | None = None,
    bind: Bind = lambda model: model,
) -> Velocity:
    """The guided velocity of captions (B, L, D) and a null text (one row for all, or B), in the dtype of the latents.

    A scale of 1 is the conditional half alone, and so are times outside `interval`, both ends included (arXiv
    2404.07724). `times` (M,) are those that sampling will visit, as far as they are known: what depends on them alone
    is computed here.
    """
    model = prepare(dit, text, times)
    if scale == 1:
        return bind(model)
    both = classifier_free(bind(model.beside(prepare(dit, null))), scale)
    return both if interval is None else switch(interval, both, bind(model))


def classifier_free(model: Velocity, scale: float) -> Velocity:
    """null + scale (text - null), by a model whose batch is the captions and then as many null texts."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        text, null = model(torch.cat([x, x]), torch.cat([t, t])).chunk(2)
        return null + scale * (text - null)

    return velocity


def switch(interval: tuple[float, float], inside: Velocity, outside: Velocity) -> Velocity:
    """One velocity within an interval of times and another outside; all rows of x have one time."""
    return lambda x, t: (inside if within(interval, t[0].item()) else outside)(x, t)


def within(interval: tuple[float, float], t: float) -> bool:
    """Whether a time lies in an interval, its ends included."""
    return interval[0] - TIME_TOLERANCE <= t <= interval[1] + TIME_TOLERANCE


def prepare(dit: Dit, text: Text, times: Tensor | None = None) -> SamplingDit:
    """The denoiser of a text without padding that no row needs, and without a mask where no padding is left."""
    text = text.trimmed()
    return dit.prepare(text, times, masked=not bool(text.mask.all()))
