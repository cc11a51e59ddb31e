"""Editing of pictures by inversion: to noise under a prompt that describes the picture, and back under another one."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sana_lab.config.ranges import Share
from sana_lab.config.specs import build
from sana_lab.diffusion import inversion
from sana_lab.diffusion.ddpm import Ddpm
from sana_lab.diffusion.guidance import guided, reads_null
from sana_lab.diffusion.sampling import Sampling, check_finite
from sana_lab.models.dit import SamplingDit
from sana_lab.models.layers import dtype_of
from sana_lab.systems.text2image import TextToImage
from sana_lab.types import Velocity


@torch.no_grad()
def edit(
    system: TextToImage,
    images: Tensor,
    sources: Sequence[str],
    targets: Sequence[str],
    *,
    sampling: Sampling,
    inject: Share = 0.0,
) -> Tensor:
    """Images (B, 3, H, W) uint8 that show `targets` where the given ones (B, 3, H, W) uint8 show `sources`.

    Inversion is without guidance, as in RF-Solver, and the way back has that of `sampling`. In the first share `inject`
    of the steps back, the second half of the blocks takes the values of self-attention from the inversion.
    SpecError for a solver that does not run in both directions; ValueError for sizes that do not fit, or noise
    prediction.
    """
    inversion.check(sampling.solver, inject)
    if isinstance(system.flow, Ddpm):
        raise ValueError("an edit inverts a flow to noise, and this model predicts noise (ddpm); expected a flow")
    if not len(images) == len(sources) == len(targets):
        given = f"{len(images)} images, {len(sources)} prompts of them and {len(targets)} of the edits"
        raise ValueError(f"{given} were given, expected as many of each")
    height, width = images.shape[-2:]
    system.latent_shape((height, width))
    pixels = images.to(system.device).float() / 127.5 - 1
    data = system.autoencoder.encode(pixels.to(dtype_of(system.autoencoder))).float()
    times = sampling.times(system.flow)
    values = inversion.Values(inversion.storable(system.dit) if inject else [])
    storing, reading = (values.storing, values.reading) if inject else (_unchanged, _unchanged)
    noise = inversion.invert(
        values.timed(_velocity(system, sources, sampling, 1.0, storing)), data, times, sampling.solver
    )
    until = float(times[min(round(inject * sampling.steps), sampling.steps)])
    back = values.timed(_velocity(system, targets, sampling, sampling.guidance, reading), until)
    latents = build("solver", sampling.solver)(back, noise, times)
    return system.pixels(check_finite(latents, dtype_of(system.dit)))


def _velocity(
    system: TextToImage,
    prompts: Sequence[str],
    sampling: Sampling,
    scale: float,
    change: Callable[[SamplingDit], SamplingDit],
) -> Velocity:
    """The velocity for prompts at a scale of guidance, of the denoiser changed as an edit needs."""
    text = system.text_encoder(prompts)
    null = system.text_encoder.negative([""], text) if reads_null(system.dit, scale) else text
    interval = sampling.guidance_interval if scale != 1 else None
    return system.flow.velocity(guided(system.dit, text, null, scale, interval, refine=change))


def _unchanged(model: SamplingDit) -> SamplingDit:
    return model
