"""Classifier-free guidance (arXiv 2207.12598) and perturbed-attention guidance in one batched forward."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sana_lab.models.dit import Dit, SamplingDit
from sana_lab.types import Text, Velocity

if TYPE_CHECKING:
    from sana_lab.diffusion.perturbed_attention import Perturbation

TIME_TOLERANCE = 1e-6
"""Tolerance for float32 times at the ends of an interval."""

Bind = Callable[[SamplingDit], Velocity]
"""Wrapper of a denoiser's steps: unchanged, or captured and replayed (`systems.cuda_graphs`)."""


def guided(
    dit: Dit,
    text: Text,
    null: Text,
    scale: float,
    interval: tuple[float, float] | None = None,
    times: Tensor | None = None,
    bind: Bind = lambda model: model,
    pag: "Perturbation | None" = None,
    refine: Callable[[SamplingDit], SamplingDit] = lambda model: model,
) -> Velocity:
    """Guided velocity for captions (B, L, D) and a null text (1 or B rows), in the dtype of the latents.

    With scale 1, and at times outside `interval` (inclusive; arXiv 2404.07724), only the conditional half is evaluated.
    `times` (M,) are the sampling times known in advance, for precomputing time-dependent values. A model distilled with
    guidance reads the scale, and `null` is not used. `pag` adds its scale times (text - perturbed), at all times.
    `refine` changes the denoiser of the captions, before a null text is put beside them.
    """
    check(dit, interval)
    check_times(dit, times)
    model = prepare(dit, text, times, scale if dit.distilled else None)
    model = refine(model if pag is None else pag.before(model))
    perturbed = 0.0 if pag is None else pag.scale
    if not reads_null(dit, scale):
        return combined(bind(model), None, perturbed)
    both = combined(bind(model.beside(prepare(dit, null))), scale, perturbed)
    return both if interval is None else switch(interval, both, combined(bind(model), None, perturbed))


def reads_null(dit: Dit, scale: float) -> bool:
    """Whether guidance evaluates the null text: not with scale 1, nor if the model is distilled with guidance."""
    return scale != 1 and not dit.distilled


def check(dit: Dit, interval: tuple[float, float] | None) -> None:
    """ValueError for an interval of guidance of a model that has guidance as an input."""
    if dit.distilled and interval is not None:
        raise ValueError(
            f"guidance_interval is {list(interval)}, but this DiT is distilled with guidance, which it reads at every "
            "step; expected null"
        )


def check_times(dit: Dit, times: Tensor | None) -> None:
    """ValueError for intervals (M, 2) of a solver of mean velocities, which the model does not predict."""
    if times is not None and times.ndim == 2 and not dit.mean_velocity:
        raise ValueError(
            "solver 'meanflow' steps by mean velocities over intervals of time, which this DiT does not predict; "
            "expected another solver, or a DiT trained with dit.mean_velocity and method meanflow"
        )


def combined(model: Velocity, scale: float | None, pag: float = 0.0) -> Velocity:
    """null + scale (text - null) + pag (text - perturbed), from a model whose batch is the perturbed captions (if pag
    is not 0), the captions, and as many null texts (if there is a scale; else text + pag (text - perturbed))."""
    copies = 1 + (pag != 0) + (scale is not None)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        rows = list(model(torch.cat([x] * copies), torch.cat([t] * copies)).chunk(copies))
        null = rows.pop() if scale is not None else None
        text = rows.pop()
        out = text if null is None or scale is None else null + scale * (text - null)
        return out + pag * (text - rows[0]) if rows else out

    return model if copies == 1 else velocity


def switch(interval: tuple[float, float], inside: Velocity, outside: Velocity) -> Velocity:
    """One velocity within an interval of times and another outside; all rows of x have the same time."""
    return lambda x, t: (inside if within(interval, t.flatten()[0].item()) else outside)(x, t)


def within(interval: tuple[float, float], t: float) -> bool:
    """Whether a time is in a closed interval, up to rounding."""
    return interval[0] - TIME_TOLERANCE <= t <= interval[1] + TIME_TOLERANCE


def prepare(dit: Dit, text: Text, times: Tensor | None = None, guidance: float | None = None) -> SamplingDit:
    """Denoiser of a text trimmed to its longest row, without a mask if no padding remains."""
    text = text.trimmed()
    scale = {} if guidance is None else {"guidance": guidance}
    return dit.prepare(text, times, masked=not bool(text.mask.all()), **scale)
