"""Flow matching: one time axis for training and sampling. t = 0 is data, t = 1 is noise."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Flow:
    """x_t = (1 - t) data + t noise, velocity = noise - data (rectified flow; SANA, section 2.4).

    `shift` moves times towards noise, t -> s t / (1 + (s - 1) t), in training and sampling alike. `start` 0.999 gives
    the released models' grid. `logit_mean` and `logit_std` shape the training times, or they are uniform.
    """

    shift: float = 3.0
    start: float = 1.0
    times: Literal["logit_normal", "uniform"] = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0

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

    def schedule(self, steps: int) -> Tensor:
        """(steps + 1,) float64 times from the shifted start down to 0, uniform before the shift."""
        if steps < 1:
            raise ValueError(f"steps is {steps}, expected at least 1")
        return self.shifted(torch.linspace(self.start, 0, steps + 1, dtype=torch.float64))
