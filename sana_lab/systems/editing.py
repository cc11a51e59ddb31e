"""Editing of pictures by inversion: to noise under a prompt that describes the picture, and back under another one."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sana_lab.config.ranges import Share
from sana_lab.config.schema import SamplingOptions
from sana_lab.config.specs import SpecError, build
from sana_lab.diffusion import inversion
from sana_lab.diffusion.ddpm import Ddpm
from sana_lab.diffusion.flow import Flow
from sana_lab.diffusion.guidance import guided, reads_null
from sana_lab.diffusion.sampling import Sampling, check_finite
from sana_lab.models.dit import Dit, SamplingDit
from sana_lab.models.layers import dtype_of
from sana_lab.systems.quantize import quantized
from sana_lab.systems.text2image import TextToImage
from sana_lab.types import Velocity

UNSUPPORTED = ("regions", "pag", "cache", "best_of", "offload")
"""Options of sampling that an edit does not apply."""


def check(sampling: Sampling, inject: Share = 0.0) -> None:
    """SpecError for options of sampling that an edit does not apply, or a share out of range."""
    inversion.check(sampling.solver, inject)
    defaults = SamplingOptions()
    for name in UNSUPPORTED:
        given, expected = getattr(sampling, name), getattr(defaults, name)
        if given != expected:
            raise SpecError(f"sampling.{name} is {given!r}, which an edit does not apply; expected {expected!r}")
    if sampling.graph == "always":
        raise SpecError("sampling.graph is 'always', and an edit captures no graphs; expected 'auto' or 'never'")


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
    of the steps back, the second half of the blocks takes the values of self-attention from the inversion; the steps
    are rounded, to at least one. A denoiser is quantised as in `TextToImage.sample`. SpecError for a solver that does
    not run in both directions, options of sampling that do not apply, or an x-prediction; ValueError for sizes that do
    not fit, or noise prediction.
    """
    check(sampling, inject)
    if isinstance(system.flow, Ddpm):
        raise ValueError("an edit inverts a flow to noise, and this model predicts noise (ddpm); expected a flow")
    if isinstance(system.flow, Flow) and system.flow.prediction == "data":
        raise SpecError(
            "an edit inverts a flow from t = 0, where the velocity of predicted data is divided by t; expected "
            "system.prediction: velocity"
        )
    if not len(images) == len(sources) == len(targets):
        given = f"{len(images)} images, {len(sources)} prompts of them and {len(targets)} of the edits"
        raise ValueError(f"{given} were given, expected as many of each")
    height, width = images.shape[-2:]
    system.latent_shape((height, width))
    dit = quantized(system.dit, sampling.precision, system._activations(sampling))
    values = inversion.Values(inversion.storable(dit) if inject else [])
    pixels = images.to(system.device).float() / 127.5 - 1
    data = system.autoencoder.encode(pixels.to(dtype_of(system.autoencoder))).float()
    times = sampling.times(system.flow)
    storing, reading = (values.storing, values.reading) if inject else (_unchanged, _unchanged)
    noise = inversion.invert(
        values.timed(_velocity(system, dit, sources, sampling, 1.0, storing)), data, times, sampling.solver
    )
    evaluations = inversion.evaluations_of(inject, times, sampling.solver)
    back = values.timed(_velocity(system, dit, targets, sampling, sampling.guidance, reading), evaluations)
    latents = build("solver", sampling.solver)(back, noise, times)
    return system.pixels(check_finite(latents, dtype_of(dit)))


def _velocity(
    system: TextToImage,
    dit: Dit,
    prompts: Sequence[str],
    sampling: Sampling,
    scale: float,
    change: Callable[[SamplingDit], SamplingDit],
) -> Velocity:
    """The velocity for prompts at a scale of guidance, of the denoiser changed as an edit needs."""
    text = system.text_encoder(prompts)
    null = system.text_encoder.negative([""], text) if reads_null(dit, scale) else text
    interval = sampling.guidance_interval if scale != 1 else None
    return system.flow.velocity(guided(dit, text, null, scale, interval, refine=change))


def _unchanged(model: SamplingDit) -> SamplingDit:
    return model
