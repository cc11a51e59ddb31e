"""Flow matching as systems share it: the loss, and its validation by time bin."""

from collections.abc import Mapping

import lightning as L
import torch
from torch import Tensor

from sana_lab.diffusion.flow import Flow
from sana_lab.diffusion.sampling import generator
from sana_lab.dit import Dit
from sana_lab.types import Text

BINS = 4
TRAIN, HELD_OUT = 1, 2  # which stream of random numbers


def velocity_losses(
    dit: Dit, flow: Flow, latents: Tensor, text: Text, random: torch.Generator, times: Tensor | None = None
) -> Tensor:
    """Squared error of the velocity (B,), mean over a latent (B, C, h, w), at random or given times (B,)."""
    noise = torch.randn(latents.shape, generator=random).to(latents)
    times = (flow.sample_times(len(latents), generator=random) if times is None else times).to(latents)
    velocity = dit(flow.mix(latents, noise, times), times, text)
    return (velocity - flow.target(latents, noise)).square().mean((1, 2, 3))


def validate(
    module: L.LightningModule, dit: Dit, flow: Flow, latents: Tensor, text: Text, seed: int, index: int
) -> None:
    """Log val/loss, and val/loss_t0 (nearest to data) to _t3, on the same noise and times each time."""
    random, n = generator(seed, HELD_OUT, index), len(latents)
    times = flow.shifted((torch.arange(n) + torch.rand(n, generator=random)) / n)
    losses = velocity_losses(dit, flow, latents, text, random, times)
    bins = (times * BINS).long().clamp(max=BINS - 1).to(losses.device)
    module.log("val/loss", losses.mean(), prog_bar=True, batch_size=n, sync_dist=True)
    for i in bins.unique().tolist():
        inside = losses[bins == i]
        module.log(f"val/loss_t{i}", inside.mean(), batch_size=len(inside), sync_dist=True)


def check_state(own: Mapping[str, Tensor], given: Mapping[str, Tensor], name: str) -> None:
    """ValueError that names keys and shapes in which a checkpoint differs from the module it is loaded into."""
    odd = sorted(own.keys() ^ given.keys())
    odd += [
        f"{k} {tuple(given[k].shape)}, expected {tuple(v.shape)}"
        for k, v in own.items()
        if k in given and given[k].shape != v.shape
    ]
    if odd:
        raise ValueError(f"the checkpoint is of another {name}: {'; '.join(odd[:5])}{' ...' if len(odd) > 5 else ''}")
