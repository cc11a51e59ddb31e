"""Interfaces of diffusion: a `Process` from data to noise, and a `Solver` that integrates it in reverse.

One time axis for training and sampling: t = 0 is data, t = 1 is noise.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor

from sana_lab.types import Velocity

Prediction = Literal["velocity", "data"]
"""Output of a flow's network: the velocity, or the clean latents (x-prediction)."""

Weighting = Literal["uniform", "cosmap", "min_snr"]
"""Weight of a flow's squared error of the velocity at a time (`Flow.weights`)."""

Grid = Literal["even", "flow_match"]
"""Spacing of sampling times: uniform before the shift, or as in diffusers' FlowMatch schedulers (`Flow.schedule`)."""


FreshNoise = Callable[[], Tensor]
"""Standard normal noise (B, C, h, w) of a batch of images, other values at each call."""


class Solver(Protocol):
    """Integrator of dx/dt = velocity(x, t) over decreasing times: a pure function; its other parameters are options.

    x (B, C, h, w) is the state at `times[0]`; the result, at `times[-1]`, has the same shape, dtype and device. `times`
    (steps + 1,) are float64 on the CPU; coefficients should be too. The solver evaluates the velocity at least once
    per step, at times t (B,) on the CPU (`solvers.at`). A solver that adds noise has a keyword-only parameter `noise`
    (`FreshNoise`), its only source of random numbers.
    """

    def __call__(self, velocity: Velocity, x: Tensor, times: Tensor, /) -> Tensor: ...


class Process(ABC):
    """Forward process, training target of the network, and the velocity that solvers integrate."""

    @abstractmethod
    def sample_times(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """(n,) random training times in [0, 1)."""

    @abstractmethod
    def shifted(self, t: Tensor) -> Tensor:
        """Map uniform times in [0, 1) to training times."""

    @abstractmethod
    def mix(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t, the network's input, from data and noise (B, ...) at times t (B,)."""

    @abstractmethod
    def target(self, data: Tensor, noise: Tensor) -> Tensor:
        """What the loss compares with, (B, ...)."""

    def as_target(self, output: Tensor, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The network's output (B, ...) at times t (B,) as the quantity of `target`."""
        return output

    def weights(self, t: Tensor) -> Tensor | None:
        """Factors (B,) of the training loss at times t (B,); None for 1."""
        return None

    @abstractmethod
    def network_times(self, t: Tensor) -> Tensor:
        """Times as given to the network in training."""

    @abstractmethod
    def with_shift(self, shift: float) -> "Process":
        """Copy with another time shift. ValueError if the process has no shift."""

    @abstractmethod
    def schedule(self, steps: int, grid: Grid = "even") -> Tensor:
        """(steps + 1,) float64 times of a solver, decreasing to 0. ValueError for an invalid number of steps."""

    @abstractmethod
    def initial(self, noise: Tensor) -> Tensor:
        """The solver's x at the first time, from Gaussian noise."""

    @abstractmethod
    def velocity(self, model: Velocity, exact_times: Tensor | None = None) -> Velocity:
        """dx/dt of the straight path (1 - t) data + t noise, from the network's prediction.

        `exact_times` (M,), float64, are the solver's times, needed if the network's times are rounded.
        """
