"""Contract of the solvers: dx/dt = velocity(x, t) from t = 1 to t = 0, against a flow whose end is known."""

import torch
from torch import Tensor

from sana_lab.contracts import Rule, Subject, expect, expect_close, expect_shape

SPREAD = 0.5
"""Standard deviation of the Gaussian data of `_flow`."""


def _flow(x: Tensor, t: Tensor) -> Tensor:
    """E[noise - data | x_t] for Gaussian data: x_0 = SPREAD x_1 exactly. Its mean over intervals t (B, 2)."""
    if t.device.type != "cpu" or t.shape not in (x.shape[:1], (len(x), 2)):
        raise ValueError(f"the solver gave times {tuple(t.shape)} on {t.device}, expected {(len(x),)} on the CPU")
    t = t.to(x.dtype)[:, None, None, None] if t.ndim == 1 else t.to(x.dtype).T[..., None, None, None]
    variance = (1 - t) ** 2 * SPREAD**2 + t**2  # of x_t
    if t.ndim == 5:
        return x * (1 - (variance[1] / variance[0]).sqrt()) / (t[0] - t[1])
    return x * (t - (1 - t) * SPREAD**2) / variance


def _noise(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=dtype)


def _times(steps: int) -> Tensor:
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def keeps_shape_and_dtype(subject: Subject) -> None:
    """The result has the noise's shape and dtype, in float32 and bfloat16; the noise is not changed."""
    solver = subject.make()
    for dtype in (torch.float32, torch.bfloat16):
        x = _noise(dtype)
        before = x.clone()
        out = solver(_flow, x, _times(4))
        expect_shape(out, tuple(x.shape), "the result")
        expect(out.dtype == dtype, f"noise of {dtype} gives a result of {out.dtype}")
        expect(torch.equal(x, before), "the noise was changed in place")


def straight_lines(subject: Subject) -> None:
    """Data of one value, whose paths are straight lines, are reached."""
    goal = torch.full_like(_noise(), 0.25)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        starts = t if t.ndim == 1 else t[:, 0]
        return (x - goal) / starts.to(x.dtype)[:, None, None, None].clamp(min=1e-12)

    out = subject.make()(velocity, _noise(), _times(4))
    expect_close(out, goal, "four steps along straight lines miss their end")


def converges(subject: Subject) -> None:
    """More steps are closer to the exact end of a curved flow."""
    solver, exact = subject.make(), SPREAD * _noise()
    few, many = (float((solver(_flow, _noise(), _times(n)) - exact).norm() / exact.norm()) for n in (8, 64))
    expect(many < few / 2 or many < 1e-6, f"the error is {few:.2g} with 8 steps and {many:.2g} with 64")
    expect(many < 0.05, f"the error is {many:.2g} with 64 steps, expected less than 0.05")


def rows_are_independent(subject: Subject) -> None:
    """The result of an image does not depend on the others of its batch, and is the same twice."""
    solver, x = subject.make(), _noise()
    alone = solver(_flow, x[1:], _times(4))
    expect_close(solver(_flow, x, _times(4))[1:], alone, "an image alone and in a batch differ")


def one_step(subject: Subject) -> None:
    """One step is enough to run."""
    expect_shape(subject.make()(_flow, _noise(), _times(1)), tuple(_noise().shape), "the result of one step")


RULES: tuple[Rule, ...] = (keeps_shape_and_dtype, one_step, straight_lines, converges, rows_are_independent)
