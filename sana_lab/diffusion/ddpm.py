"""Noise prediction (DDPM, arXiv 2006.11239), the baseline objective of SANA's comparison with flow matching."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sana_lab.diffusion import Grid, Process
from sana_lab.ops.transfer import to_device
from sana_lab.types import Velocity


@dataclass(frozen=True)
class Ddpm(Process):
    """x_k = a_k data + s_k noise at integer steps k, where a_k^2 + s_k^2 = 1; the network predicts the noise.

    a_k^2 is the product of 1 - beta up to step k. Solvers work on the equivalent flow: x / (a + s) at the time
    t = s / (a + s) is (1 - t) data + t noise. In these variables Euler is DDIM with eta 0, and `dpmpp` is the
    DPM-Solver++ of diffusion models.
    """

    steps: int = 1000  # training steps of the process; the network's time is k / steps
    first: float = 1e-4  # beta of the first step; betas are linear in k
    last: float = 0.02  # beta of the last step

    def sample_times(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """(n,) training times k / steps, uniform."""
        return torch.randint(self.steps, (n,), generator=generator) / self.steps

    def shifted(self, t: Tensor) -> Tensor:
        """Times in [0, 1) rounded down to steps; there is no shift."""
        return (t * self.steps).floor() / self.steps

    def mix(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_k for times k / steps (B,)."""
        k = (t.double() * self.steps).round().long()
        signal, sigma = (to_device(v, k.device)[k] for v in (self.signal, self.sigma))
        a, s = (v.to(data).view(-1, *[1] * (data.ndim - 1)) for v in (signal, sigma))
        return a * data + s * noise

    def target(self, data: Tensor, noise: Tensor) -> Tensor:
        return noise

    def network_times(self, t: Tensor) -> Tensor:
        return t

    def with_shift(self, shift: float) -> "Ddpm":
        raise ValueError(f"sampling shift is {shift}, but noise prediction has no shift; expected null")

    def schedule(self, steps: int, grid: Grid = "even") -> Tensor:
        """(steps + 1,) float64 flow times of steps that end at the last one ("trailing", arXiv 2305.08891), and 0."""
        if not 1 <= steps <= self.steps:
            raise ValueError(f"steps is {steps}, expected 1 to {self.steps}, what noise prediction was trained on")
        if grid != "even":
            raise ValueError(f"grid is {grid!r}, but noise prediction has its own steps; expected 'even'")
        k = (self.steps - torch.arange(steps, dtype=torch.float64) * self.steps / steps).round().long() - 1
        return torch.cat([self.times[k], torch.zeros(1)])

    def initial(self, noise: Tensor) -> Tensor:
        """Noise is x at the last step; dividing by a + s gives x of the flow."""
        return noise / float(self.signal[-1] + self.sigma[-1])

    def velocity(self, model: Velocity, exact_times: Tensor | None = None) -> Velocity:
        """(noise - x) / (1 - t) from the predicted noise."""

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            alpha = to_device(1 - t, x.device, x.dtype).view(-1, *[1] * (x.ndim - 1))
            scale = (alpha**2 + (1 - alpha) ** 2).rsqrt()  # a + s
            return (model(scale * x, self._step_times(t)) - x) / alpha

        return velocity

    def _step_times(self, t: Tensor) -> Tensor:
        """k / steps at flow times, interpolated between steps."""
        table, t64 = self.times.to(t.device), t.double().contiguous()
        above = torch.searchsorted(table, t64).clamp(1, self.steps - 1)
        part = (t64 - table[above - 1]) / (table[above] - table[above - 1])
        return ((above - 1 + part.clamp(0, 1)) / self.steps).to(t)

    @cached_property
    def signal(self) -> Tensor:
        """a (steps,) in float64."""
        betas = torch.linspace(self.first, self.last, self.steps, dtype=torch.float64, device="cpu")
        return (1 - betas).cumprod(0).sqrt()

    @cached_property
    def sigma(self) -> Tensor:
        """s (steps,) in float64."""
        return (1 - self.signal**2).sqrt()

    @cached_property
    def times(self) -> Tensor:
        """Flow times (steps,) of the steps, increasing."""
        return self.sigma / (self.signal + self.sigma)
