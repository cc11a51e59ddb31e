"""Flow matching with straight paths between data and noise (rectified flow)."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from sana_lab.diffusion import Grid, Prediction, Process, Weighting
from sana_lab.ops.transfer import to_device
from sana_lab.types import Velocity

ROUNDING, ROUNDING_FLOAT64 = 1.2e-4, 1e-9
"""Tolerance of rounding down to thousandths, in thousandths: 1000 t in float32 may be 6e-5 below the integer k."""

MIN_TIME = 0.05
"""Smallest time that divides an error of the data in training (x-prediction; JiT, arXiv 2511.13720)."""

MIN_SAMPLING_TIME = 1e-4
"""Smallest time that divides in sampling; schedules end their evaluations above it."""

SNR_LIMIT = 5.0
"""Limit of the signal-to-noise ratio in `min_snr` (arXiv 2303.09556)."""


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
    prediction: Prediction = "velocity"  # the network's output; the loss is on the velocity in both cases
    weighting: Weighting = "uniform"  # weight of the loss by time

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
        t = _wide(t, data)
        return (1 - t) * data + t * noise

    def target(self, data: Tensor, noise: Tensor) -> Tensor:
        return noise - data

    def as_target(self, output: Tensor, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The velocity; from predicted data it is (x_t - output) / t, whose error is divided by at least `MIN_TIME`."""
        if self.prediction == "velocity":
            return output
        return noise - data + (data - output) / _wide(t, data).clamp(min=MIN_TIME)

    def weights(self, t: Tensor) -> Tensor | None:
        """Factors (B,) of the squared error of the velocity at times t (B,).

        `cosmap` is 2 / (pi (1 - 2 t + 2 t^2)), the density of a cosine schedule's times (SD3, arXiv 2403.03206).
        `min_snr` weights the error of the data by min(SNR, 5), SNR = (1 - t)^2 / t^2, which is t^2 min(SNR, 5) here.
        """
        if self.weighting == "uniform":
            return None
        if self.weighting == "cosmap":
            return 2 / (math.pi * (1 - 2 * t + 2 * t**2))
        return torch.minimum((1 - t) ** 2, SNR_LIMIT * t**2)

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
        """The network's velocity, or that of its predicted data. Times are rounded from `exact_times`, as float32 may
        fall below a thousandth."""
        rounded = self._rounded(model, exact_times)
        return rounded if self.prediction == "velocity" else _from_data(rounded)

    def _rounded(self, model: Velocity, exact_times: Tensor | None) -> Velocity:
        if exact_times is None or self.model_time == "exact":
            return model
        rounded = self.network_times(exact_times)
        return lambda x, t: model(x, rounded.to(t)[_nearest(exact_times.to(t), t)])


def _wide(t: Tensor, x: Tensor) -> Tensor:
    """Times (B,) beside x (B, ...), with its device and dtype."""
    return to_device(t, x.device, x.dtype).view(-1, *[1] * (x.ndim - 1))


def _from_data(model: Velocity) -> Velocity:
    """(x - predicted data) / t."""
    return lambda x, t: (x - model(x, t)) / _wide(t, x).clamp(min=MIN_SAMPLING_TIME)


def _nearest(times: Tensor, t: Tensor) -> Tensor:
    """Indices (B,) of the times (M,) nearest to t (B,)."""
    return (times[:, None] - t).abs().argmin(0)
