"""Sampling of a trained model: solver, steps, guidance and initial noise."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sana_lab.config.schema import SamplingOptions
from sana_lab.config.specs import SpecError, build, name_of
from sana_lab.diffusion import Process
from sana_lab.types import Velocity

ROUNDING_SOLVERS = ("dpmpp", "unipc")
"""Solvers whose diffusers counterparts round the network's times; diffusers' Euler and Heun do not."""


@dataclass(frozen=True)
class Sampling(SamplingOptions):
    """Section `sampling:` of an experiment, with its solver loop."""

    def __post_init__(self) -> None:
        low, high = self.guidance_interval or (0, 1)
        if not 0 <= low <= high <= 1:
            given = f"{low} to {high}"
            raise ValueError(f"guidance_interval is {given}, expected two times from 0 (data) to 1 (noise), rising")

    def run(self, model: Velocity, noise: Tensor, process: Process) -> Tensor:
        """Integrate from noise (B, C, h, w) to latents with a (guided) network's prediction."""
        times = self.times(process)
        velocity = process.velocity(model, times if name_of(self.solver) in ROUNDING_SOLVERS else None)
        return build("solver", self.solver)(velocity, process.initial(noise), times)

    def times(self, process: Process) -> Tensor:
        """(steps + 1,) times of the solver. ValueError for an option that the process does not support."""
        return (process if self.shift is None else process.with_shift(self.shift)).schedule(self.steps, self.grid)

    def network_times(self, process: Process, dtype: torch.dtype = torch.float32) -> Tensor:
        """The network's times for latents of `dtype`, one per evaluation, from a run on zeros.

        A solver that adapts its times to the latents may use others. SpecError for a function that is no `Solver`.
        """
        times: list[Tensor] = []

        def record(x: Tensor, t: Tensor) -> Tensor:
            times.append(t)
            return torch.zeros_like(x)

        noise = torch.zeros(1, 1, 1, 1, dtype=dtype, device="cpu")
        check_result(self.run(record, noise, process), noise, len(times), name_of(self.solver))
        return torch.cat(times)


def check_result(result: object, noise: Tensor, evaluations: int, solver: str) -> None:
    """SpecError if a solver's result is not a latent tensor like `noise`, or if it never evaluated the velocity."""
    expected = f"latents {tuple(noise.shape)} in {noise.dtype}".replace("torch.", "")
    if not isinstance(result, Tensor):
        raise SpecError(f"solver {solver!r} returned {type(result).__name__}, expected {expected}")
    if (result.shape, result.dtype) != (noise.shape, noise.dtype):
        given = f"{tuple(result.shape)} in {result.dtype}".replace("torch.", "")
        raise SpecError(f"solver {solver!r} returned {given}, expected {expected}, as it was given")
    if not evaluations:
        raise SpecError(f"solver {solver!r} did not evaluate the velocity; expected one evaluation or more in a step")


class Overflow(RuntimeError):
    """Sampled latents are not finite."""


def check_finite(latents: Tensor, dtype: torch.dtype) -> Tensor:
    """Latents (B, C, h, w) unchanged. Overflow names the images that are not finite, and remedies for a denoiser of
    `dtype`."""
    bad = (~latents.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    if not bad:
        return latents
    images = ", ".join(map(str, bad[:5])) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
    half = (
        "float16 overflows above 65504: sample with the denoiser in bfloat16 or float32, such as system.dit.bfloat16()"
    )
    wide = f"{dtype} has the range, so look at the weights, the guidance and the number of steps"
    remedy = half if dtype == torch.float16 else wide.removeprefix("torch.")
    raise Overflow(f"latents are not finite in images {images} of {len(latents)}; {remedy}")


def check_request(prompts: Sequence[str], negatives: Sequence[str], indices: Sequence[int]) -> None:
    """ValueError unless there is a prompt, and one negative prompt and one image index for each."""
    if isinstance(prompts, str) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise ValueError(f"prompts is {prompts!r}, expected a list with at least one text")
    if len(negatives) != len(prompts) or len(indices) != len(prompts):
        counts = f"{len(prompts)} prompts, {len(negatives)} negative prompts and {len(indices)} indices"
        raise ValueError(f"{counts} were given, expected as many of each")


def noise_like(shape: Sequence[int], seed: int, indices: Sequence[int]) -> Tensor:
    """Gaussian noise (len(indices), *shape); image i depends only on (seed, indices[i])."""
    return torch.stack([torch.randn(*shape, generator=generator(seed, i)) for i in indices])


def generator(*key: int) -> torch.Generator:
    """A CPU generator seeded by its key, so that random numbers do not depend on earlier ones."""
    state = 0x9E3779B97F4A7C15
    for part in key:  # splitmix64
        state = (state + (part & 0xFFFFFFFFFFFFFFFF) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 27
    return torch.Generator().manual_seed(state & 0x7FFFFFFFFFFFFFFF)
