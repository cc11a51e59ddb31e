"""How a trained model is sampled: solver, steps, guidance; and the noise it begins from."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from sana_lab.config.specs import RUNTIME, AsBefore, Spec, build, name_of
from sana_lab.diffusion.ddpm import Ddpm
from sana_lab.diffusion.flow import Flow, Grid
from sana_lab.models.dit import Quantize
from sana_lab.types import Velocity

WHOLE = ("dpmpp", "unipc")
"""Solvers whose peers in diffusers round the time that the network sees; its Euler and Heun do not."""


@dataclass(frozen=True)
class Sampling:
    """Options of `sampling:` in an experiment; they train nothing, so changing them reuses the trained model.

    `shift` None takes the flow's own. Guidance acts while the network's time is within `guidance_interval`, both ends
    included (arXiv 2404.07724); outside, the prompt is followed alone in half the work. `grid` is how times lie.
    `quantize` rounds the products of the denoiser's blocks to eight bits (`systems.quantize`). With `offload` each
    network is on the device only while it works: the same result in less of its memory. `graph` replays steps as CUDA
    graphs (`systems.graphs`).
    """

    solver: Annotated[Spec, "solver"] = "dpmpp"
    steps: int = 20
    guidance: float = 4.5
    shift: float | None = None
    guidance_interval: Annotated[tuple[float, float] | None, AsBefore(None)] = None
    grid: Annotated[Grid, AsBefore("even")] = "even"
    quantize: Annotated[Quantize, AsBefore("none")] = "none"
    offload: Annotated[bool, RUNTIME] = False
    graph: Annotated[Literal["auto", "never", "always"], RUNTIME] = "auto"

    def __post_init__(self) -> None:
        low, high = self.guidance_interval or (0, 1)
        if not 0 <= low <= high <= 1:
            given = f"{low} to {high}"
            raise ValueError(f"guidance_interval is {given}, expected two times from 0 (data) to 1 (noise), rising")

    def run(self, model: Velocity, noise: Tensor, flow: Flow | Ddpm) -> Tensor:
        """Integrate from noise (B, C, h, w) to latents, by what a (guided) network predicts."""
        times = self.times(flow)
        velocity = flow.velocity(model, whole=times if name_of(self.solver) in WHOLE else None)
        return build("solver", self.solver)(velocity, flow.begin(noise), times)

    def told(self, flow: Flow | Ddpm, dtype: torch.dtype = torch.float32) -> Tensor:
        """The times that the network will be told for latents of `dtype`, one for each evaluation: of a run on zeros.

        A solver of one's own may choose its times by the latents; then it may ask for others.
        """
        seen: list[Tensor] = []

        def still(x: Tensor, t: Tensor) -> Tensor:
            seen.append(t)
            return torch.zeros_like(x)

        self.run(still, torch.zeros(1, 1, 1, 1, dtype=dtype, device="cpu"), flow)
        return torch.cat(seen)

    def times(self, flow: Flow | Ddpm) -> Tensor:
        """(steps + 1,) times that the solver visits. ValueError where an option is not one of this objective."""
        return self._shifted(flow).schedule(self.steps, self.grid)

    def _shifted(self, flow: Flow | Ddpm) -> Flow | Ddpm:
        if self.shift is None:
            return flow
        if isinstance(flow, Ddpm):
            raise ValueError(f"sampling shift is {self.shift}, but noise prediction has no shift; expected null")
        return replace(flow, shift=self.shift)


class Overflow(RuntimeError):
    """What was drawn is not finite."""


def check_finite(latents: Tensor, dtype: torch.dtype) -> Tensor:
    """Latents (B, C, h, w) as they are, if all are finite; one look at the end of sampling. Overflow names the images
    where not, and what to do: `dtype` is the denoiser's."""
    bad = (~latents.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    if not bad:
        return latents
    named = ", ".join(map(str, bad[:5])) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
    half = "float16 overflows above 65504: draw with the denoiser in bfloat16 or float32, such as system.dit.bfloat16()"
    wide = f"{dtype} has the range, so look at the weights, the guidance and the number of steps"
    said = half if dtype == torch.float16 else wide.removeprefix("torch.")
    raise Overflow(f"latents are not finite in images {named} of {len(latents)}; {said}")


def noise_like(shape: Sequence[int], seed: int, indices: Sequence[int]) -> Tensor:
    """Gaussian noise (len(indices), *shape), where image i depends on (seed, indices[i]) alone."""
    return torch.stack([torch.randn(*shape, generator=generator(seed, i)) for i in indices])


def generator(*key: int) -> torch.Generator:
    """A CPU generator that is a function of its key, so that no draw depends on what was drawn before."""
    state = 0x9E3779B97F4A7C15
    for part in key:  # splitmix64
        state = (state + (part & 0xFFFFFFFFFFFFFFFF) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 27
    return torch.Generator().manual_seed(state & 0x7FFFFFFFFFFFFFFF)
