"""The loss of flow matching and of noise prediction, and its validation by time bin."""

from typing import Literal, NamedTuple

import lightning as L
import torch
from torch import Tensor

from sana_lab.config.specs import SpecError
from sana_lab.diffusion import Prediction, Process, Weighting
from sana_lab.diffusion.ddpm import Ddpm
from sana_lab.diffusion.flow import Flow
from sana_lab.diffusion.sampling import generator
from sana_lab.models.dit import Dit
from sana_lab.ops.transfer import to_device
from sana_lab.types import WHOLE, Part, Text, Velocity

BINS = 4  # of times, for validation
TRAIN, HELD_OUT = 1, 2  # streams of random numbers

Objective = Literal["flow", "ddpm"]
"""Prediction of the network: the velocity of a straight flow, or the noise."""


def process(
    objective: Objective,
    shift: float,
    start: float,
    model_time: Literal["exact", "released"],
    prediction: Prediction = "velocity",
    weighting: Weighting = "uniform",
) -> Process:
    """The process from data to noise of an objective; the other options are the flow's. SpecError for one of them that
    noise prediction does not have."""
    if objective == "flow":
        return Flow(shift, start, model_time=model_time, prediction=prediction, weighting=weighting)
    for name, value, default in (("prediction", prediction, "velocity"), ("weighting", weighting, "uniform")):
        if value != default:
            raise SpecError(f"system.{name} is {value!r}, an option of objective 'flow', and objective is 'ddpm'")
    return Ddpm()


class Noised(NamedTuple):
    """What the network of a training step is given, beside the text."""

    latents: Tensor  # (B, C, h, w)
    noise: Tensor  # (B, C, h, w)
    times: Tensor  # (B,)
    ends: Tensor | None = None  # (B,) ends of intervals from `times` down, over which velocities are means


def noised(
    flow: Process, latents: Tensor, random: torch.Generator, times: Tensor | None = None, part: Part = WHOLE
) -> Noised:
    """Latents with random noise, and with random times if none are given: those of this part of a batch."""
    (n, *shape), device = latents.shape, latents.device
    noise = to_device(part.draw(lambda k: torch.randn(k, *shape, generator=random), n), device, latents.dtype)
    times = part.draw(lambda k: flow.sample_times(k, generator=random), n) if times is None else times
    return Noised(latents, noise, to_device(times, latents.device, latents.dtype))


def velocity_losses(
    dit: Dit,
    flow: Process,
    latents: Tensor,
    text: Text,
    random: torch.Generator,
    times: Tensor | None = None,
    part: Part = WHOLE,
) -> Tensor:
    """Squared errors (B,) of the velocity, or of the noise that `Ddpm` predicts, mean over a latent (C, h, w).

    Times (B,) are sampled from the process if not given. Random numbers are those of this part of a batch.
    """
    return squared_errors(lambda x, t: dit(x, t, text), flow, noised(flow, latents, random, times, part))


def squared_errors(model: Velocity, flow: Process, inputs: Noised) -> Tensor:
    """`velocity_losses` of a model whose text is bound."""
    return (predict(model, flow, inputs) - flow.target(inputs.latents, inputs.noise)).square().mean((1, 2, 3))


def predict(model: Velocity, flow: Process, inputs: Noised) -> Tensor:
    """The network's prediction (B, C, h, w) of the flow's target."""
    latents, noise, times, ends = inputs
    given = flow.network_times(times if ends is None else torch.stack([times, ends], -1))
    output = model(flow.mix(latents, noise, times), given)
    return flow.as_target(output, latents, noise, times)


def bound(dit: Dit, text: Text, draws: int) -> Velocity:
    """The network with its text, for `draws` noises of each latent in succession; the text is prepared once."""
    return (lambda x, t: dit(x, t, text)) if draws == 1 else dit.prepare(text).repeat(draws)


def check_draws(draws: int) -> None:
    """ValueError for less than one noise for each image."""
    if draws < 1:
        raise ValueError(f"draws is {draws}, expected at least 1 noise and time for each image of a step")


def repeated(x: Tensor, draws: int) -> Tensor:
    """Each row `draws` times in succession."""
    return x if draws == 1 else x.repeat_interleave(draws, 0)


def validate(
    module: L.LightningModule, dit: Dit, flow: Process, latents: Tensor, text: Text, seed: int, index: int
) -> None:
    """Log val/loss, and val/loss_t0 (nearest to data) to _t3; noise and times depend only on (seed, index)."""
    random, n = generator(seed, HELD_OUT, index), len(latents)
    times = flow.shifted((torch.arange(n) + torch.rand(n, generator=random)) / n)
    losses = velocity_losses(dit, flow, latents, text, random, times)
    bins = (times * BINS).long().clamp(max=BINS - 1).to(losses.device)
    module.log("val/loss", losses.mean(), prog_bar=True, batch_size=n, sync_dist=True)
    for i in bins.unique().tolist():
        inside = losses[bins == i]
        module.log(f"val/loss_t{i}", inside.mean(), batch_size=len(inside), sync_dist=True)
