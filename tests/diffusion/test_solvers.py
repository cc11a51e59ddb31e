"""Solvers on a Gaussian, whose flow is known in closed form; their measured orders; dpmpp against diffusers."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from sana_lab import parts
from sana_lab.diffusion.flow import Flow
from sana_lab.diffusion.solvers import dpmpp, euler, heun

NAMES = sorted(parts.TABLE["solver"])
MEAN, STD = 0.7, 0.4  # of the data
START = torch.linspace(-3, 3, 7, dtype=torch.float64).view(7, 1, 1, 1)
Solver = Callable[..., Tensor]


def variance(t: Tensor) -> Tensor:
    """Of x_t = (1 - t) data + t noise, for data N(MEAN, STD^2)."""
    return (1 - t) ** 2 * STD**2 + t**2


def velocity(x: Tensor, t: Tensor) -> Tensor:
    """E[noise - data | x_t]: a linear function of x."""
    t = t.view(-1, 1, 1, 1)
    return (t - (1 - t) * STD**2) / variance(t) * (x - (1 - t) * MEAN) - MEAN


def flowed(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Where the flow takes x from time t to s: the standardised value stays."""
    return (1 - s) * MEAN + variance(s).sqrt() * (x - (1 - t) * MEAN) / variance(t).sqrt()


def error(solver: Solver, times: Tensor) -> float:
    return (solver(velocity, START, times) - flowed(START, times[0], times[-1])).norm().item()


def order(solver: Solver, grid: Callable[[int], Tensor], steps: int) -> float:
    """Log2 of how the error falls when the steps double."""
    return math.log2(error(solver, grid(steps)) / error(solver, grid(2 * steps)))


def inner(steps: int) -> Tensor:
    """Away from both ends, where the log-SNR is infinite."""
    return torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64)


# --- the closed form


def test_the_closed_form_is_the_flow_of_the_velocity():
    one, t = torch.ones((), dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64)
    slope = (flowed(START, one, t + 1e-5) - flowed(START, one, t - 1e-5)) / 2e-5
    assert torch.allclose(slope, velocity(flowed(START, one, t), t.expand(7)), atol=1e-8)


@pytest.mark.parametrize(
    ("solver", "expected"),
    [(euler, 1), (heun, 2), (partial(dpmpp, order=1), 1), (dpmpp, 2)],
    ids=["euler", "heun", "dpmpp1", "dpmpp2"],
)
def test_order_of_convergence(solver: Solver, expected: int):
    assert order(solver, inner, 128) == pytest.approx(expected, abs=0.1)
    assert error(solver, inner(256)) < 1e-2


@pytest.mark.parametrize(
    ("solver", "least"), [(euler, 0.95), (heun, 1.95), (partial(dpmpp, order=1), 0.95), (dpmpp, 1.6)]
)
@pytest.mark.parametrize("start", [1.0, 0.999])
def test_order_from_noise_to_data(solver: Solver, least: float, start: float):
    """Over the whole schedule; dpmpp's first-order ends cost it a logarithm, log N / N^2."""
    assert order(solver, Flow(3.0, start).schedule, 256) > least


def test_second_order_pays_at_twenty_steps():
    times = Flow(3.0).schedule(20)
    assert error(dpmpp, times) < error(euler, times) / 2


@pytest.mark.parametrize("name", NAMES)
def test_data_of_one_value_is_reached_in_one_step(name: str):
    """x - t velocity is the data itself, so that every solver's last step is exact."""
    for steps in (1, 2, 5):
        times = Flow(3.0).schedule(steps)
        made = parts.build("solver", name)(lambda x, t: (x - MEAN) / t.view(-1, 1, 1, 1), START, times)
        assert torch.allclose(made, torch.full_like(made, MEAN))


# --- the contract


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_and_shape_are_kept_and_times_are_exact(name: str, dtype: torch.dtype):
    seen = []

    def watched(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        assert x.dtype == dtype
        return velocity(x, t.to(dtype))

    times = Flow(3.0).schedule(20)
    made = parts.build("solver", name)(watched, START.to(dtype), times)
    assert (made.dtype, made.shape) == (dtype, START.shape)
    assert all(t.shape == (7,) for t in seen)
    assert all((times.float() - t[0].float()).abs().min() < 1e-6 for t in seen)


@pytest.mark.parametrize(("name", "evaluations"), [("euler", 10), ("heun", 19), ("dpmpp", 10)])
def test_evaluations(name: str, evaluations: int):
    """One a step; heun two, but for the step that ends at 0."""
    calls = []
    parts.build("solver", name)(lambda x, t: calls.append(t) or velocity(x, t), START, Flow().schedule(10))
    assert len(calls) == evaluations


@pytest.mark.parametrize("name", NAMES)
def test_rows_do_not_meet_and_the_noise_is_left_alone(name: str):
    solver, times, noise = parts.build("solver", name), Flow().schedule(6), START.clone()
    made = solver(velocity, noise, times)
    assert torch.equal(noise, START)
    assert torch.allclose(made[2:3], solver(velocity, START[2:3], times))


# --- diffusers


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers on numpy 2
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10, 14, 20])
@pytest.mark.parametrize("first", [1, 2])
def test_dpmpp_is_diffusers_multistep_solver(steps: int, first: int):
    """On one velocity that is no straight line, at the same float64 times; diffusers rounds each step to float32."""
    from diffusers import DPMSolverMultistepScheduler

    def curved(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(2 * x) * torch.cos(3 * t.view(-1, 1, 1, 1)) + 0.3 * x

    times = Flow(3.0, start=0.999).schedule(steps)
    peer = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=first
    )
    peer.set_timesteps(steps)
    peer.sigmas = times
    peer.set_begin_index(0)
    x = START
    for i in range(steps):
        x = peer.step(curved(x, times[i].expand(7)), peer.timesteps[i], x).prev_sample
    ours = dpmpp(curved, START, times, order=first)
    assert x.dtype == torch.float64
    assert (ours - x).abs().max() <= 1e-6
