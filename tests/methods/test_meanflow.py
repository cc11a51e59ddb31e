"""MeanFlow: its identity on Gaussian data, its derivative by differences, its targets, and training with it."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_methods
import torch
from torch import Tensor

from sana_lab.config import experiments, registry, specs
from sana_lab.config.specs import SpecError
from sana_lab.diffusion.flow import Flow
from sana_lab.diffusion.meanflow import meanflow
from sana_lab.methods import Model, Step
from sana_lab.methods.meanflow import mean_target, mean_velocity, wide
from sana_lab.models.layers import sinusoid
from sana_lab.ops import backend
from sana_lab.ops.forward_mode import jvp
from sana_lab.ops.modulate import modulate
from sana_lab.training import checks
from sana_lab.types import Text

SPREAD, MEAN = 0.6, 0.4
"""Of Gaussian data, whose velocities are known."""


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def deviation(t: Tensor) -> Tensor:
    return ((1 - t) ** 2 * SPREAD**2 + t**2).sqrt()


def exact(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """The mean velocity of Gaussian data: x keeps its standardised value along the flow."""
    t, r = wide(t, x), wide(r, x)
    end = (1 - r) * MEAN + deviation(r) / deviation(t) * (x - (1 - t) * MEAN)
    return (x - end) / (t - r)


def marginal(x: Tensor, t: Tensor) -> Tensor:
    """E[noise - data | x_t]."""
    t = wide(t, x)
    slope = (t - (1 - t) * SPREAD**2) / deviation(t) ** 2
    return -MEAN + slope * (x - (1 - t) * MEAN)


def dit(**options: Any) -> Any:
    """In float64, with an embedding of intervals that is not zero."""
    model = tiny.dit(dtype=torch.float64, mean_velocity=True, **options)
    torch.nn.init.normal_(model.interval_embed.mlp[-1].weight, std=0.1)
    return model


def method(model: Any, frozen: Any = None, trains: bool = False, **options: Any) -> Any:
    part = specs.build("method", {"name": "meanflow", **options})
    part.name = "meanflow"
    part.build(Model(model, 64, (4, 4), 4, text_trains=trains, frozen=lambda kind, spec, **supplied: frozen))
    return part


def step(rows: int = 6, draws: int = 1) -> Step:
    """A step in float64 whose target is the sample's velocity."""
    s = tiny_methods.step(rows=rows, draws=draws)
    s.latents, s.noise, s.times = s.latents.double(), s.noise.double(), s.times.double()
    s.target = s.noise - s.latents
    return s


# --- the identity


def test_the_mean_velocity_of_a_gaussian_is_its_own_target():
    """In float64 to 1e-10, along the marginal velocity."""
    x, t, r = random(8, 2, 3, 3), torch.linspace(0.3, 1.0, 8).double(), torch.linspace(0.0, 0.7, 8).double() * 0.4
    target = mean_target(exact, x, t, r, marginal(x, t))
    assert (target - exact(x, t, r)).abs().max() < 1e-10
    assert (target - marginal(x, t)).abs().max() > 0.1


def test_the_target_of_samples_is_the_mean_velocity_on_average():
    """Least squares of the target on x, 200,000 samples at one interval: slope and offset within 5 standard errors."""
    n, t, r = 200_000, 0.8, 0.3
    data, noise = MEAN + SPREAD * random(n, 1), random(n, 1, seed=1)
    x, times, ends = (1 - t) * data + t * noise, torch.full((n,), t).double(), torch.full((n,), r).double()
    target = mean_target(exact, x, times, ends, noise - data)
    design = torch.cat([x, torch.ones_like(x)], 1)
    fit = torch.linalg.lstsq(design, target).solution
    errors = ((target - design @ fit).square().mean() * (design.T @ design).inverse().diagonal()).sqrt()
    points = torch.tensor([[0.0], [1.0]]).double()
    low, high = exact(points, times[:2], ends[:2]).flatten()
    expected = torch.stack([high - low, low])
    assert errors.max() < 0.01
    assert ((fit.flatten() - expected).abs() < 5 * errors).all()


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_solver_is_exact_in_any_number_of_steps(steps: int):
    noise = random(4, 2, 3, 3)
    latents = meanflow(lambda x, t: exact(x, t[:, 0], t[:, 1]), noise, Flow(1.5).schedule(steps))
    assert (latents - (MEAN + SPREAD * noise)).abs().max() < 1e-10


# --- the derivative


@pytest.mark.parametrize("attention", [*registry.TABLE["attention"], "qk_norm", "sincos"])
def test_the_derivative_of_every_mixer_is_that_of_differences(attention: str):
    """In float64: 1e-6 of the derivative, central differences of 1e-5."""
    options: dict[str, Any] = {"attention": attention, "depth": 2, "dim": 32}
    if attention == "qk_norm":
        options |= {"attention": {"name": "linear", "head_dim": 8, "qk_norm": True}, "cross_norm": True}
    if attention == "sincos":
        options |= {"attention": "softmax", "position": "sincos", "base": 4}
    model, text = dit(time_scale=10.0, **options), tiny.caption([3, 2])
    x, v = tiny.latents(2, (4, 4)), tiny.latents(2, (4, 4), seed=3)
    t, r = torch.tensor([0.9, 0.4]).double(), torch.tensor([0.2, 0.1]).double()
    u, h = mean_velocity(model, text), 1e-5
    with torch.no_grad():
        derivative = (v - mean_target(u, x, t, r, v)) / wide(t - r, x)
        difference = (u(x + h * v, t + h, r) - u(x - h * v, t - h, r)) / (2 * h)
    assert derivative.norm() > 0.1
    assert tiny.error(derivative, difference) < 1e-6


def test_kernels_have_no_forward_mode(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backend, "missing_triton", lambda: None)  # whether it is installed or not
    x, vector = torch.randn(1, 2, 2, 8), torch.randn(1, 8)
    jvp(lambda x: modulate(x, vector, vector), (x,), (x,))
    with pytest.raises(ValueError, match=r"needs reverse mode, not torch\.func\.jvp"):
        jvp(lambda x: modulate(x, vector, vector, backend="triton"), (x,), (x,))


def test_smoothing_is_a_gaussian_mean_over_times():
    """Of the sinusoid, against the sum over a grid of shifts."""
    t, width = torch.tensor([0.3, 0.7]).double(), 0.02
    shifts = torch.linspace(-8 * width, 8 * width, 4001).double()
    weights = torch.exp(-((shifts / width) ** 2) / 2)
    mean = sum(w * sinusoid(1000 * (t + s), 16) for w, s in zip(weights / weights.sum(), shifts, strict=True))
    assert (sinusoid(1000 * t, 16, smoothing=1000 * width) - mean).abs().max() < 1e-6
    assert (sinusoid(1000 * t, 16) - mean).abs().max() > 0.1


# --- the DiT


def test_a_new_embedding_of_intervals_changes_nothing():
    plain, new = tiny.dit(), tiny.dit(mean_velocity=True)
    new.load_state_dict(plain.state_dict(), strict=False)
    x, t, text = (
        tiny.latents(2, dtype=torch.float32),
        torch.tensor([0.9, 0.4]),
        tiny.caption([3, 2], dtype=torch.float32),
    )
    assert torch.equal(new(x, t, text), plain(x, t, text))
    assert torch.equal(new(x, torch.stack([t, 0.2 * t], -1), text), plain(x, t, text))
    with pytest.raises(ValueError, match="which this DiT does not read"):
        plain(x, torch.stack([t, t], -1), text)


def test_times_are_intervals_without_length():
    model, x, text = dit(), tiny.latents(2), tiny.caption([3, 2])
    t = torch.tensor([0.9, 0.4]).double()
    assert torch.equal(model(x, t, text), model(x, torch.stack([t, t], -1), text))
    assert tiny.error(model(x, torch.stack([t, 0 * t], -1), text), model(x, t, text)) > 1e-3


# --- targets


@pytest.mark.parametrize("draws", [1, 2])
def test_without_intervals_it_is_flow_matching(draws: int):
    s = step(draws=draws)
    times, target = s.times, s.target
    method(dit(), share=0.0).begin(s)
    assert torch.equal(s.target, target)
    assert torch.equal(s.times, times)
    assert s.ends is not None
    assert torch.equal(s.ends, times)


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize(
    "options", [{}, {"guidance": 2.5}, {"guidance": 2.5, "mix": 0.4}, {"mix": 0.4}, {"teacher": 3.0}]
)
def test_targets_row_by_row(draws: int, options: dict[str, Any]):
    """Each row by itself from the definition, its derivative by differences: 1e-6."""
    model, teacher, s = dit(), tiny.dit(depth=2, dtype=torch.float64), step(rows=8, draws=draws)
    scale, mix, text, null = options.get("guidance", 1.0), options.get("mix", 0.0), s.text, s.null()
    if "teacher" in options:
        options, scale = {"teacher": "sana", "guidance": options["teacher"]}, options["teacher"]
    before = s.times
    method(model, teacher, share=0.7, start=0.5, **options).begin(s)
    inside = s.ends < s.times
    assert 0 < inside.sum() < len(inside)
    assert (s.times == 1).sum() > 0
    assert torch.equal(s.times[~inside], before[~inside])
    for i in range(len(s.latents)):
        one, item = slice(i, i + 1), slice(i // draws, i // draws + 1)
        own, t, r = Text(text.tokens[item], text.mask[item]), s.times[one], s.ends[one]
        x = (1 - t) * s.latents[one] + t * s.noise[one]
        with torch.no_grad():
            if "teacher" in options:
                a, b = teacher(x, t, own), teacher(x, t, null)
                v = b + scale * (a - b)
            else:
                omega = scale * (1 - mix)
                v = omega * (s.noise - s.latents)[one] + mix * model(x, t, own) + (1 - omega - mix) * model(x, t, null)
            h = 1e-6
            moved = [model(x + e * v, torch.stack([t + e, r], -1), own) for e in (h, -h)]
        target = v - (t - r) * (moved[0] - moved[1]) / (2 * h)
        assert tiny.error(s.target[one], target) < 1e-6


def test_the_weight_is_a_power_of_the_error():
    errors = torch.tensor([0.0, 0.5, 3.0])
    for power in (0.0, 0.5, 1.0):
        assert torch.allclose(method(dit(), power=power)._weight(errors), 1 / (errors + 1e-3) ** power)


def test_the_derivative_warms_up_within_a_limit():
    """At half of the warm-up half of the change counts, and no more than the limit times v."""
    change, v = 8 * random(3, 2, 4, 4), random(3, 2, 4, 4, seed=1)
    part = method(dit(), warmup=10)
    part.batches += 5
    assert torch.allclose(part._stable(change, v), change / 2)
    limited = method(dit(), limit=2.0)._stable(change, v)
    for a, b, c in zip(limited, change, v, strict=True):
        assert float(a.square().mean().sqrt()) == pytest.approx(2 * float(c.square().mean().sqrt()))
        assert torch.allclose(a / a.norm(), b / b.norm())
    assert torch.equal(method(dit(), limit=100.0)._stable(change, v), change)


# --- what does not fit


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["system.dit.mean_velocity=false", "sampling.solver=euler"], "expected system.dit.mean_velocity: true"),
        (["system.prediction=data", "sampling.solver=euler"], "needs a network that predicts the velocity of a flow"),
        (["system.objective=ddpm", "sampling.solver=euler"], "needs a network that predicts the velocity of a flow"),
        (["system.method={name: meanflow, mix: 0.5, teacher: sana}"], "has mix 0.5.*expected one of them"),
        (["system.method={name: meanflow, teacher: sana}"], "expected system.train_text: false"),
        (["system.prediction=data"], "solver 'meanflow' steps by velocities that the network predicts"),
        (["trainer.compile=true"], "trainer.compile is true; expected false"),
        (["system.method=null", "system.dit.mean_velocity=false"], "solver 'meanflow' steps by mean velocities"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(here: Path, overrides: list[str], words: str):
    changes = {"system.dit.mean_velocity": True, "system.method": "meanflow", "sampling.solver": "meanflow"}
    tiny.write_experiment(here, changes=changes)
    checks.check(experiments.load("tiny"))
    with pytest.raises(SpecError, match=words):
        checks.check(experiments.load("tiny", overrides))
