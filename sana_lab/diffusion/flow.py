"""Flow matching with straight paths between data and noise (rectified flow)."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from sana_lab.diffusion import Grid, Process
from sana_lab.types import Velocity

ROUNDING, ROUNDING_FLOAT64 = 1.2e-4, 1e-9
"""Tolerance of rounding down to thousandths, in thousandths: 1000 t in float32 may be 6e-5 below the integer k."""


@dataclass(frozen=True)
class Flow(Process):
    """x_t = (1 - t) data + t noise, velocity = noise - data (rectified flow; SANA, section 2.4)."""

    shift: float = 3.0  # shifts times towards noise, t -> s t / (1 + (s - 1) t), in training and sampling; above 0
    start: float = 1.0  # first sampling time before the shift, in (0, 1]; 0.999 in the released models
    times: Literal["logit_normal", "uniform"] = "logit_normal"  # distribution of training times before the shift
    logit_mean: float = 0.0  # mean of the logit of logit-normal times
    logit_std: float = 1.0  # standard deviation of the logit of logit-normal times
    # Times given to the network: exact, or rounded down to thousandths, as in training of the released models and in
    # diffusers' multistep solvers (`sampling.ROUNDING_SOLVERS`).
    model_time: Literal["exact", "released"] = "exact"

    def __post_init__(self) -> None:
        if not (self.shift > 0 and 0 < self.start <= 1):
            raise ValueError(
                f"flow has shift {self.shift} and start {self.start}, expected shift > 0 and 0 < start <= 1"
            )

    def sample_times(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """(n,) training times in (0, 1), shifted."""
        if self.times == "uniform":
            return self.shifted(torch.rand(n, generator=generator))
        return self.shifted(torch.sigmoid(self.logit_mean + self.logit_std * torch.randn(n, generator=generator)))

    def shifted(self, t: Tensor) -> Tensor:
        return self.shift * t / (1 + (self.shift - 1) * t)

    def mix(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        t = t.to(data).view(-1, *[1] * (data.ndim - 1))
        return (1 - t) * data + t * noise

    def target(self, data: Tensor, noise: Tensor) -> Tensor:
        return noise - data

    def network_times(self, t: Tensor) -> Tensor:
        if self.model_time == "exact":
            return t
        tolerance = ROUNDING_FLOAT64 if t.dtype == torch.float64 else ROUNDING
        return ((1000 * t.double() + tolerance).floor() / 1000).to(t)

    def with_shift(self, shift: float) -> "Flow":
        return replace(self, shift=shift)

    def schedule(self, steps: int, grid: Grid = "even") -> Tensor:
        """(steps + 1,) float64 times from the shifted start down to 0, uniform before the shift.

        `flow_match` is the grid of diffusers' FlowMatchEulerDiscreteScheduler and of NVlabs' Flow-Euler: uniform from 1
        (regardless of `start`) to the shifted 1/1000, shifted a second time, then 0.
        """
        if steps < 1:
            raise ValueError(f"steps is {steps}, expected at least 1")
        if grid == "even":
            return self.shifted(torch.linspace(self.start, 0, steps + 1, dtype=torch.float64))
        last = self.shifted(torch.tensor(0.001, dtype=torch.float64)).item()
        return torch.cat([self.shifted(torch.linspace(1, last, steps, dtype=torch.float64)), torch.zeros(1)])

    def initial(self, noise: Tensor) -> Tensor:
        return noise

    def velocity(self, model: Velocity, exact_times: Tensor | None = None) -> Velocity:
        """The network's prediction; times are rounded from `exact_times`, as float32 may fall below a thousandth."""
        if exact_times is None or self.model_time == "exact":
            return model
        rounded = self.network_times(exact_times)
        return lambda x, t: model(x, rounded.to(t)[_nearest(exact_times.to(t), t)])


def _nearest(times: Tensor, t: Tensor) -> Tensor:
    """Indices (B,) of the times (M,) nearest to t (B,)."""
    return (times[:, None] - t).abs().argmin(0)
