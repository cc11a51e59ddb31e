"""Sampling of a trained model: solver, steps, guidance and initial noise."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sana_lab.config.schema import SamplingOptions
from sana_lab.config.specs import SpecError, build, find, name_of, resolve
from sana_lab.diffusion import FreshNoise, Process, scm
from sana_lab.diffusion.ddpm import Ddpm
from sana_lab.diffusion.perturbed_attention import Perturbation
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
        if self.quantize_rank is not None and not self.quantize.endswith("4_simulated"):
            raise ValueError(
                f"quantize_rank is {self.quantize_rank}, of 4-bit products, and quantize is {self.quantize!r}; "
                "expected int4_simulated or nvfp4_simulated, or quantize_rank null"
            )
        if self.cache is not None and self.graph == "always":
            raise ValueError(
                "sampling.graph is 'always', and sampling.cache chooses in each step which blocks run, which no CUDA "
                "graph does; expected graph auto or never, or cache null"
            )

        self._check_together()

    def _check_together(self) -> None:
        """ValueError for options that exclude each other, and for regions and measures that cannot be."""
        if self.regions is not None:
            build("regions", self.regions)  # errors in the regions themselves
            if self.cache is not None or self.graph == "always":
                given, expected = ("cache", "null") if self.cache is not None else ("graph", "auto or never")
                raise ValueError(
                    f"sampling.{given} is set, and sampling.regions changes from step to step what the denoiser reads; "
                    f"expected {given} {expected}, or regions null"
                )
        if self.pag_layers is not None and not self.pag:
            raise ValueError(f"pag_layers is {self.pag_layers}, and pag is 0; expected pag above 0, such as 3")
        if self.pag and self.pag_layers is not None and not self.pag_layers:
            raise ValueError(f"pag_layers is [], and pag is {self.pag:g}; expected at least one block, or null")
        if (self.best_of > 1) != (self.best_by is not None):
            raise ValueError(
                f"best_of is {self.best_of} and best_by is {self.best_by}; expected both, such as best_of 4 and "
                "best_by clip_shapes, or best_of 1 and best_by null"
            )

    @property
    def perturbation(self) -> Perturbation | None:
        """Perturbed-attention guidance; None if its scale is 0."""
        return Perturbation(self.pag, self.pag_layers) if self.pag else None

    def run(self, model: Velocity, noise: Tensor, process: Process, fresh: FreshNoise | None = None) -> Tensor:
        """Integrate from noise (B, C, h, w) to latents with a (guided) network's prediction.

        `fresh` makes the noise of a solver that adds some. ValueError if such a solver gets none.
        """
        times = self.times(process)
        velocity = process.velocity(model, times if name_of(self.solver) in ROUNDING_SOLVERS else None)
        return build("solver", self.solver, **self._supplied(fresh))(velocity, process.initial(noise), times)

    @property
    def precision(self) -> str:
        """`quantize`, and the rank of its correction if it has one: what a denoiser's `quantized` is compared with."""
        return self.quantize if self.quantize_rank is None else f"{self.quantize}:{self.quantize_rank}"

    @property
    def adds_noise(self) -> bool:
        """Whether the solver adds noise between its steps."""
        return "noise" in inspect.signature(find("solver", name_of(self.solver))).parameters

    def _supplied(self, fresh: FreshNoise | None) -> dict[str, FreshNoise]:
        if not self.adds_noise:
            return {}
        if fresh is None:
            raise ValueError(f"solver {name_of(self.solver)!r} adds noise between steps; expected `fresh` to make it")
        return {"noise": fresh}

    def times(self, process: Process) -> Tensor:
        """(steps + 1,) times of the solver. ValueError for an option that the process or solver does not support."""
        if name_of(self.solver) == "scm":
            return self._angles(process)
        if name_of(self.solver) == "meanflow" and getattr(process, "prediction", None) != "velocity":
            raise ValueError(
                "solver 'meanflow' steps by velocities that the network predicts; expected objective: flow and "
                "prediction: velocity"
            )
        return (process if self.shift is None else process.with_shift(self.shift)).schedule(self.steps, self.grid)

    def _angles(self, process: Process) -> Tensor:
        """Times of `scm`, which depend neither on the flow's shift nor on the grid. ValueError where they are set."""
        if self.shift is not None or self.grid != "even":
            given = f"shift {self.shift} and grid {self.grid!r} were given"
            raise ValueError(f"solver 'scm' has times of its own, and {given}; expected shift null and grid 'even'")
        if isinstance(process, Ddpm):
            raise ValueError("solver 'scm' begins at pure noise, and noise prediction (ddpm) does not; expected a flow")
        return scm.schedule(self.steps, resolve("solver", self.solver)["middle"])

    def network_times(self, process: Process, dtype: torch.dtype = torch.float32) -> Tensor:
        """The network's times for latents of `dtype`, one per evaluation, from a run on zeros.

        A solver that adapts its times to the latents may use others. SpecError for a function that is no `Solver`.
        """
        times: list[Tensor] = []

        def record(x: Tensor, t: Tensor) -> Tensor:
            times.append(t)
            return torch.zeros_like(x)

        noise = torch.zeros(1, 1, 1, 1, dtype=dtype, device="cpu")
        check_result(self.run(record, noise, process, fresh=lambda: noise), noise, len(times), name_of(self.solver))
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
    return NoiseStreams(shape, seed, indices)()


class NoiseStreams:
    """Gaussian noise of a batch of images, other values at each call; that of image i depends only on (seed,
    indices[i]) and on the number of calls before. An index may be several numbers."""

    def __init__(self, shape: Sequence[int], seed: int, indices: Sequence[int | tuple[int, ...]]) -> None:
        keys = ((i,) if isinstance(i, int) else i for i in indices)
        self.shape, self.generators = tuple(shape), [generator(seed, *key) for key in keys]

    def __call__(self) -> Tensor:
        """(len(indices), *shape) in float32 on the CPU."""
        return torch.stack([torch.randn(*self.shape, generator=g) for g in self.generators])


def generator(*key: int) -> torch.Generator:
    """A CPU generator seeded by its key, so that random numbers do not depend on earlier ones."""
    state = 0x9E3779B97F4A7C15
    for part in key:  # splitmix64
        state = (state + (part & 0xFFFFFFFFFFFFFFFF) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 27
    return torch.Generator().manual_seed(state & 0x7FFFFFFFFFFFFFFF)
