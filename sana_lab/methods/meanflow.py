"""Few steps by training: the network learns mean velocities over intervals of time (MeanFlow, arXiv 2505.13447).

u(x, r, t) is the mean velocity from t down to r along the flow's path through x at t. Its definition, differentiated by
t along the path, is u = v - (t - r) du/dt with du/dt = v du/dx + du/dt, whose right side is the target. The derivative
is one product of Jacobian and vector (torch.func.jvp), in plain torch and without a gradient; the pass that is trained
keeps its kernels.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, final

import torch
from annotated_types import Ge, Lt
from torch import Tensor

from sana_lab.config.ranges import Nonnegative, Positive, Share, Steps
from sana_lab.config.specs import Spec, SpecError
from sana_lab.methods import Method, Model, Step
from sana_lab.models.dit import Dit
from sana_lab.ops.backend import no_autocast
from sana_lab.ops.forward_mode import jvp
from sana_lab.ops.transfer import to_device
from sana_lab.types import Text

OFFSET = 1e-3
"""Added to the mean squared error of an item in its weight."""

MeanVelocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x (B, ...), t (B,), r (B,)) -> mean velocity from t down to r (B, ...)."""


@final
class MeanFlow(Method):
    """The objective becomes that of mean velocities: the target is v - (t - r) du/dt, and v where r = t.

    For a DiT with `mean_velocity`; sample with solver meanflow, and with guidance 1 if the target has guidance. v is
    noise - data, or with a `teacher` its velocity at x, which has no variance. The term in the log is the mean squared
    error without the weight.
    """

    velocities = True
    replaces_target = True

    def __init__(
        self,
        share: Share = 0.25,  # share of rows with r below t, r uniform below it; in the others r = t
        start: Share = 0.0,  # share of those rows that begin at t = 1, pure noise, as the first step of sampling does
        guidance: Positive = 1.0,  # scale of classifier-free guidance in the target
        # Share of the network's own velocity in the target, kappa of the paper, in [0, 1); 0 with a teacher.
        mix: Annotated[float, Ge(0), Lt(1)] = 0.0,
        warmup: Steps = 0,  # batches over which the factor of du/dt in the target rises from 0 to 1, for stability
        # Largest root mean square of (t - r) du/dt in an item, as a multiple of that of v; null is no limit.
        limit: Positive | None = None,
        power: Nonnegative = 1.0,  # an item's squared error is divided by (error + 0.001)^power; 0 is no weight
        # Frozen DiT whose velocity is v, such as experiment:shapes_sana; null is that of the sample, as in the paper.
        teacher: Annotated[Spec | None, "dit"] = None,
    ) -> None:
        super().__init__()
        self.weight = 0.0  # of the term for the log
        self.share, self.start, self.guidance, self.mix, self.power = share, start, guidance, mix, power
        self.teacher, self.warmup, self.limit = teacher, warmup, limit
        self.batches: Tensor
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    def build(self, model: Model) -> None:
        if not model.dit.mean_velocity:
            raise SpecError(
                f"method {self.name!r} trains mean velocities, and the DiT reads no intervals of time; expected "
                "system.dit.mean_velocity: true"
            )
        if self.mix and self.teacher is not None:
            raise SpecError(
                f"method {self.name!r} has mix {self.mix:g}, a share of the network's own velocity in its target, and "
                "a teacher, whose velocity is the target; expected one of them"
            )
        dit = model.dit if self.teacher is None else model.teacher(self.teacher, self.name)
        self.networks: list[Dit] = [model.dit, dit]  # in a list, so that no checkpoint holds them

    def check_sampling(self, sampling: Mapping[str, Any]) -> None:
        if self.guidance != 1 and sampling["guidance"] != 1:
            raise SpecError(
                f"sampling.guidance is {sampling['guidance']:g}, and the target of method {self.name!r} holds a "
                f"guidance of {self.guidance:g} already; expected sampling.guidance 1"
            )

    @property
    def changes_forward(self) -> bool:
        return True

    @torch.no_grad()
    def begin(self, step: Step) -> None:
        """Draw the intervals, and compute the target of each row."""
        device = step.latents.device
        own, begins, length = to_device(step.uniform(3), device, step.times.dtype).unbind(-1)
        inside = own < self.share
        t = torch.where(inside & (begins < self.start), torch.ones_like(step.times), step.times)
        r = torch.where(inside, length * t, t)
        x = (1 - wide(t, step.latents)) * step.latents + wide(t, step.latents) * step.noise
        with no_autocast(device):
            target = self._velocity(step, x, t)
            rows = (r < t).nonzero().flatten()
            if len(rows):
                text = step.of_rows(step.text, rows)
                u = mean_velocity(self.networks[0], text)
                v = target[rows]
                target[rows] = v - self._stable(v - mean_target(u, x[rows], t[rows], r[rows], v), v)
        self.batches += 1
        step.times, step.ends, step.target, step.weigh = t, r, target, self._weight

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        return {self.name: (step.prediction - step.target).square().mean()}

    def _weight(self, errors: Tensor) -> Tensor:
        return (errors + OFFSET) ** -self.power

    def _stable(self, change: Tensor, v: Tensor) -> Tensor:
        """(t - r) du/dt under the warm-up and the limit."""
        if self.warmup:
            change = change * (self.batches / self.warmup).clamp(max=1).to(change.dtype)
        if self.limit is None:
            return change
        largest, size = (self.limit * rms(v), rms(change))
        return change * (largest / size.clamp(min=torch.finfo(size.dtype).tiny)).clamp(max=1)

    def _velocity(self, step: Step, x: Tensor, t: Tensor) -> Tensor:
        """v (B', C, h, w) of each row, with guidance: the teacher's, or in the sample's velocity v0, with kappa = mix,
        omega v0 + kappa u(x, t, t | text) + (1 - omega - kappa) u(x, t, t), omega = guidance (1 - kappa) (eq. 21)."""
        rows, dit = torch.arange(len(x), device=x.device), self.networks[1]

        def velocity(text: Text) -> Tensor:
            return dit.without_guidance(x, t, step.of_rows(text, rows))

        def null() -> Tensor:
            assert step.null is not None
            return velocity(step.null())

        if self.teacher is not None:
            conditional = velocity(step.text)
            return conditional if self.guidance == 1 else torch.lerp(null(), conditional, self.guidance)
        omega = self.guidance * (1 - self.mix)
        target = omega * (step.noise - step.latents)
        target = target + self.mix * velocity(step.text) if self.mix else target
        return target if self.guidance == 1 else target + (1 - omega - self.mix) * null()


def mean_velocity(dit: Dit, text: Text) -> MeanVelocity:
    """The mean velocity of a network for a text."""
    return lambda x, t, r: dit(x, torch.stack([t, r], -1), text)


def mean_target(u: MeanVelocity, x: Tensor, t: Tensor, r: Tensor, v: Tensor) -> Tensor:
    """v - (t - r) du/dt along dx/dt = v, with r fixed (MeanFlow, eq. 10)."""
    derivative = jvp(lambda x, t: u(x, t, r), (x, t), (v, torch.ones_like(t)))[1]
    return v - wide(t - r, x) * derivative


def rms(x: Tensor) -> Tensor:
    """Root mean square of each item of (B, C, h, w), (B, 1, 1, 1)."""
    return x.square().mean((1, 2, 3), keepdim=True).sqrt()


def wide(t: Tensor, x: Tensor) -> Tensor:
    """Times (B,) beside x (B, ...)."""
    return t.view(-1, *[1] * (x.ndim - 1))
