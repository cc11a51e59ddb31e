"""Flow matching: one time axis for training and sampling. t = 0 is data, t = 1 is noise."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sana_lab.types import Velocity

SLIP, SLIP_FLOAT64 = 1.2e-4, 1e-9
"""What rounding down to thousandths forgives, in thousandths: float32 may lie 6e-5 below k where k/1000 is meant."""

Grid = Literal["even", "flow_match"]
"""How a schedule lies: even before the shift, or as diffusers' FlowMatch schedulers have it (`Flow.schedule`)."""


@dataclass(frozen=True)
class Flow:
    """x_t = (1 - t) data + t noise, velocity = noise - data (rectified flow; SANA, section 2.4).

    `shift` moves times towards noise, t -> s t / (1 + (s - 1) t), in training and sampling alike. `start` 0.999 gives
    the released models' grid. `logit_mean` and `logit_std` shape the training times, or they are uniform.
    `model_time` released tells the network whole thousandths, rounded down: in training and, as diffusers does, to the
    solvers of `sampling.WHOLE`.
    """

    shift: float = 3.0
    start: float = 1.0
    times: Literal["logit_normal", "uniform"] = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
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
        """x_t for times t (B,)."""
        t = t.to(data).view(-1, *[1] * (data.ndim - 1))
        return (1 - t) * data + t * noise

    def target(self, data: Tensor, noise: Tensor) -> Tensor:
        return noise - data

    def seen(self, t: Tensor) -> Tensor:
        """Times as the network is told them."""
        if self.model_time == "exact":
            return t
        slip = SLIP_FLOAT64 if t.dtype == torch.float64 else SLIP
        return ((1000 * t.double() + slip).floor() / 1000).to(t)

    def schedule(self, steps: int, grid: Grid = "even") -> Tensor:
        """(steps + 1,) float64 times from the shifted start down to 0, uniform before the shift.

        On the grid `flow_match` they are those of diffusers' FlowMatchEulerDiscreteScheduler, which NVlabs' Flow-Euler
        uses too: from 1, whatever `start` is, evenly to the shifted 1/1000, shifted once more, and then 0.
        """
        if steps < 1:
            raise ValueError(f"steps is {steps}, expected at least 1")
        if grid == "even":
            return self.shifted(torch.linspace(self.start, 0, steps + 1, dtype=torch.float64))
        last = self.shifted(torch.tensor(0.001, dtype=torch.float64)).item()
        return torch.cat([self.shifted(torch.linspace(1, last, steps, dtype=torch.float64)), torch.zeros(1)])

    def begin(self, noise: Tensor) -> Tensor:
        """Where a solver begins."""
        return noise

    def velocity(self, model: Velocity, whole: Tensor | None = None) -> Velocity:
        """dx/dt by a network's output. `whole` are the float64 times that a solver visits, where the network sees whole
        thousandths of them in the reference: what float32 makes of a time may lie on the other side of one."""
        if whole is None or self.model_time == "exact":
            return model
        told = self.seen(whole)
        return lambda x, t: model(x, told.to(t)[_nearest(whole.to(t), t)])


def _nearest(times: Tensor, t: Tensor) -> Tensor:
    """Which of the times (M,) each of t (B,) is."""
    return (times[:, None] - t).abs().argmin(0)
