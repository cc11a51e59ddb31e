"""How a trained model is sampled: solver, steps, guidance; and the noise it begins from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from sana_lab.diffusion.flow import Flow
from sana_lab.parts import Spec, build
from sana_lab.types import Velocity


@dataclass(frozen=True)
class Sampling:
    """Options of `sampling:` in an experiment; they train nothing, so changing them reuses the trained model.

    `shift` None takes the flow's own.
    """

    solver: Annotated[Spec, "solver"] = "dpmpp"
    steps: int = 20
    guidance: float = 4.5
    shift: float | None = None

    def run(self, velocity: Velocity, noise: Tensor, flow: Flow) -> Tensor:
        """Integrate from noise (B, C, h, w) to latents."""
        if self.shift is not None:
            flow = Flow(self.shift, flow.start)
        return build("solver", self.solver)(velocity, noise, flow.schedule(self.steps))


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
