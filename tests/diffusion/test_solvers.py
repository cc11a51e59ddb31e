"""Solvers on a Gaussian, whose flow is known in closed form; their measured orders; and against diffusers."""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from sana_lab.config import registry, specs
from sana_lab.diffusion import scm
from sana_lab.diffusion.flow import Flow
from sana_lab.diffusion.sampling import Sampling
from sana_lab.diffusion.solvers import dpmpp, euler, heun, rf_solver
from sana_lab.diffusion.unipc import unipc

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers on numpy 2
NAMES = sorted({*registry.TABLE["solver"]} - {"meanflow"})  # of mean velocities: tests/methods/test_meanflow.py
MEAN, STD = 0.7, 0.4  # of the data
START = torch.linspace(-3, 3, 7, dtype=torch.float64).view(7, 1, 1, 1)
Solver = Callable[..., Tensor]


def build(name: str) -> Solver:
    """The solver with its options, and with noise of 0.3 for all rows if it adds any."""
    adds_noise = Sampling(name).adds_noise
    return specs.build("solver", name, **({"noise": lambda: torch.full((), 0.3)} if adds_noise else {}))


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


def bending(x: Tensor, t: Tensor) -> Tensor:
    """A velocity that is linear in nothing: on a Gaussian's, errors of some solvers cancel."""
    return -torch.cos(2 * t.view(-1, 1, 1, 1)) * (1 + x**2) / 2


def bent(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Where that takes x from time t to s."""
    return torch.tan(torch.atan(x) - (torch.sin(2 * s) - torch.sin(2 * t)) / 4)


def bent_error(solver: Solver, times: Tensor) -> float:
    return (solver(bending, START / 4, times) - bent(START / 4, times[0], times[-1])).norm().item()


def order(solver: Solver, grid: Callable[[int], Tensor], steps: int, error: Callable[..., float] = error) -> float:
    """Log2 of how the error falls when the steps double."""
    return math.log2(error(solver, grid(steps)) / error(solver, grid(2 * steps)))


def inner(steps: int) -> Tensor:
    """Away from both ends, where the log-SNR is infinite."""
    return torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64)


def graded(steps: int) -> Tensor:
    """The same, with first steps so short that a multistep solver's start, of low order, does not count."""
    return 0.9 - 0.8 * torch.linspace(0, 1, steps + 1, dtype=torch.float64) ** 2


# --- the closed form


def test_the_closed_form_is_the_flow_of_the_velocity():
    one, t = torch.ones((), dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64)
    slope = (flowed(START, one, t + 1e-5) - flowed(START, one, t - 1e-5)) / 2e-5
    assert torch.allclose(slope, velocity(flowed(START, one, t), t.expand(7)), atol=1e-8)


def test_the_other_closed_form_is_the_flow_of_its_velocity():
    one, t, x = torch.ones((), dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64), START / 4
    slope = (bent(x, one, t + 1e-5) - bent(x, one, t - 1e-5)) / 2e-5
    assert torch.allclose(slope, bending(bent(x, one, t), t.expand(7)), atol=1e-8)


@pytest.mark.parametrize(
    ("solver", "grid", "expected"),
    [
        (euler, inner, 1),
        (heun, inner, 2),
        (rf_solver, inner, 2),
        (partial(dpmpp, order=1), inner, 1),
        (dpmpp, graded, 2),
        (partial(dpmpp, order=3), inner, 2),
        (partial(unipc, order=1), inner, 2),
        (unipc, graded, 3),
        (partial(unipc, order=3), graded, 4),
    ],
    ids=["euler", "heun", "rf_solver", "dpmpp1", "dpmpp2", "dpmpp3", "unipc1", "unipc2", "unipc3"],
)
def test_order_of_convergence(solver: Solver, grid: Callable[[int], Tensor], expected: int):
    """UniPC's corrector adds one to its predictor's; the published dpmpp of order 3 falls short."""
    assert order(solver, grid, 256, bent_error) == pytest.approx(expected, abs=0.1)
    assert error(solver, grid(256)) < 1e-2


def test_a_higher_order_pays():
    errors = [bent_error(partial(solver, order=n), graded(256)) for solver in (dpmpp, unipc) for n in (1, 2, 3)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[3] > 2 * errors[4] > 4 * errors[5]


@pytest.mark.parametrize(
    ("solver", "least"),
    [(euler, 0.95), (heun, 1.95), (rf_solver, 1.95), (partial(dpmpp, order=1), 0.95), (dpmpp, 1.6), (unipc, 1.6)],
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
        result = build(name)(lambda x, t: (x - MEAN) / t.view(-1, 1, 1, 1), START, times)
        assert torch.allclose(result, torch.full_like(result, MEAN))


# --- the contract


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_and_shape_are_kept_and_times_are_exact(name: str, dtype: torch.dtype):
    """The times are the schedule's; rf_solver's are those between as well."""
    visited = []

    def watched(x: Tensor, t: Tensor) -> Tensor:
        visited.append(t)
        assert x.dtype == dtype
        return velocity(x, t.to(dtype))

    times = Flow(3.0).schedule(20)
    result = build(name)(watched, START.to(dtype), times)
    assert (result.dtype, result.shape) == (dtype, START.shape)
    assert all(t.shape == (7,) for t in visited)
    known = torch.cat([times, (times[1:] + times[:-1]) / 2]) if name == "rf_solver" else times
    assert all((known.float() - t[0].float()).abs().min() < 1e-6 for t in visited)


@pytest.mark.parametrize(
    ("name", "evaluations"), [("euler", 10), ("heun", 19), ("dpmpp", 10), ("rf_solver", 20), ("unipc", 10), ("scm", 10)]
)
def test_evaluations(name: str, evaluations: int):
    """One a step; heun two, but for the step that ends at 0; rf_solver two in each."""
    calls = []
    build(name)(lambda x, t: calls.append(t) or velocity(x, t), START, Flow().schedule(10))
    assert len(calls) == evaluations


@pytest.mark.parametrize("name", NAMES)
def test_rows_do_not_meet_and_the_noise_is_left_alone(name: str):
    solver, times, noise = build(name), Flow().schedule(6), START.clone()
    result = solver(velocity, noise, times)
    assert torch.equal(noise, START)
    assert torch.allclose(result[2:3], solver(velocity, START[2:3], times))


# --- diffusers: on one velocity that is no straight line, at the same float64 times; it rounds each step to float32

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def curved(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(2 * x) * torch.cos(3 * t.view(-1, 1, 1, 1)) + 0.3 * x


def by_diffusers(scheduler: Any, times: Tensor, sigmas: Tensor) -> Tensor:
    """The scheduler's own loop from START at our times in float64; `sigmas` is how it repeats them."""
    scheduler.set_timesteps(len(times) - 1)
    assert len(scheduler.sigmas) == len(sigmas) == len(scheduler.timesteps) + 1
    scheduler.sigmas = sigmas
    scheduler.set_begin_index(0)
    x = START
    for t, sigma in zip(scheduler.timesteps, sigmas[:-1], strict=True):
        x = scheduler.step(curved(x, sigma.expand(7)), t, x, return_dict=False)[0]
    assert x.dtype == torch.float64
    return x


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 10, 14, 15, 20])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpmpp_is_diffusers_multistep_solver(steps: int, order: int):
    times = Flow(3.0, start=0.999).schedule(steps)
    peer = by_diffusers(diffusers.DPMSolverMultistepScheduler(**FLOW, solver_order=order), times, times)
    assert (dpmpp(curved, START, times, order=order) - peer).abs().max() <= 1e-6


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 10, 20])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_is_diffusers(steps: int, order: int):
    times = Flow(3.0, start=0.999).schedule(steps)
    peer = by_diffusers(diffusers.UniPCMultistepScheduler(**FLOW, solver_order=order), times, times)
    assert (unipc(curved, START, times, order=order) - peer).abs().max() <= 1e-6


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 20])
def test_euler_and_heun_are_diffusers(steps: int):
    times = Flow(3.0, start=0.999).schedule(steps)
    twice = torch.cat([times[:1], times[1:-1].repeat_interleave(2), times[-1:]])
    plain = by_diffusers(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), times, times)
    second = by_diffusers(diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0), times, twice)
    assert (euler(curved, START, times) - plain).abs().max() <= 1e-6
    assert (heun(curved, START, times) - second).abs().max() <= 1e-6


def test_rf_solver_is_the_midpoint_rule():
    """diffusers has no such scheduler: against a loop of its own."""
    times, x = Flow(3.0).schedule(7), START
    for t, s in pairwise(times):
        half = x + (s - t) / 2 * curved(x, t.expand(7))
        x = x + (s - t) * curved(half, ((s + t) / 2).expand(7))
    assert (rf_solver(curved, START, times) - x).abs().max() <= 1e-12


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 20])
@pytest.mark.parametrize("deviation", [0.5, 1.0])
def test_scm_is_diffusers_loop(steps: int, deviation: float):
    """The scheduler and the formulas of SanaSprintPipeline, whose standard deviation of the data cancels."""
    scheduler = diffusers.SCMScheduler(sigma_data=deviation)
    scheduler.set_timesteps(steps, max_timesteps=math.pi / 2, intermediate_timesteps=1.3 if steps == 2 else None)
    scheduler.timesteps = scheduler.timesteps.double()
    scheduler.set_begin_index(0)
    random, x = torch.Generator().manual_seed(0), START * deviation
    for angle in scheduler.timesteps[:-1]:
        t = (angle.sin() / (angle.sin() + angle.cos())).expand(7)
        scale = (t**2 + (1 - t) ** 2).sqrt().view(-1, 1, 1, 1)
        y, v = x / deviation * scale, t.view(-1, 1, 1, 1)
        predicted = ((1 - 2 * v) * y + (1 - 2 * v + 2 * v**2) * curved(y, t)) / scale * deviation
        x, data = scheduler.step(predicted, angle, x, generator=random, return_dict=False)
    again = torch.Generator().manual_seed(0)
    solver = partial(scm.scm, noise=lambda: torch.randn(START.shape, generator=again))
    assert (solver(curved, START, scm.schedule(steps)) - data / deviation).abs().max() <= 1e-6
