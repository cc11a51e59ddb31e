"""Interfaces of diffusion: a `Process` between data and noise, and a `Solver` that goes back along it.

One time axis for training and sampling: t = 0 is data, t = 1 is noise.
"""

from abc import ABC, abstractmethod
from typing import Literal, Protocol

import torch
from torch import Tensor

from sana_lab.types import Velocity

Grid = Literal["even", "flow_match"]
"""Spacing of sampling times: even before the shift, or that of diffusers' FlowMatch schedulers (`Flow.schedule`)."""


class Solver(Protocol):
    """Integrates dx/dt = velocity(x, t) over falling times: a pure function, whose further parameters are options.

    x (B, C, h, w) begins at `times[0]`; the result, at `times[-1]`, has the same shape, dtype and device. `times`
    (steps + 1,) are float64 on the CPU, and so should be the solver's coefficients. It evaluates the velocity once or
    more in each step, at times t (B,) on the CPU (`solvers.at`).
    """

    def __call__(self, velocity: Velocity, x: Tensor, times: Tensor, /) -> Tensor: ...


class Process(ABC):
    """How data becomes noise, what the network predicts of it in training, and the velocity that solvers integrate."""

    @abstractmethod
    def sample_times(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """(n,) random training times in [0, 1)."""

    @abstractmethod
    def shifted(self, t: Tensor) -> Tensor:
        """Uniform times in [0, 1) as training times."""

    @abstractmethod
    def mix(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t, the network's input, of data and noise (B, ...) at times t (B,)."""

    @abstractmethod
    def target(self, data: Tensor, noise: Tensor) -> Tensor:
        """The network's target (B, ...)."""

    @abstractmethod
    def network_times(self, t: Tensor) -> Tensor:
        """Times as the network reads them in training."""

    @abstractmethod
    def with_shift(self, shift: float) -> "Process":
        """The same with another shift of its times. ValueError where it has none."""

    @abstractmethod
    def schedule(self, steps: int, grid: Grid = "even") -> Tensor:
        """(steps + 1,) float64 times of a solver, falling to 0. ValueError for a number of steps that cannot be."""

    @abstractmethod
    def initial(self, noise: Tensor) -> Tensor:
        """The solver's x at the first time, of Gaussian noise."""

    @abstractmethod
    def velocity(self, model: Velocity, exact_times: Tensor | None = None) -> Velocity:
        """dx/dt of the straight path (1 - t) data + t noise, by the network's prediction.

        `exact_times` (M,), float64, are those that the solver visits, where the network's times are rounded from them.
        """
