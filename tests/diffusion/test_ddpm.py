"""Noise prediction against diffusers' DDPM, DDIM and DPM-Solver++ schedulers, and on data whose noise is known."""

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from sana_lab.config import registry
from sana_lab.diffusion.ddpm import Ddpm
from sana_lab.diffusion.sampling import Sampling

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers on numpy 2
MEAN, STD = 0.7, 0.4  # of the data
START = torch.linspace(-3, 3, 7, dtype=torch.float64).view(7, 1, 1, 1)


def of_a_gaussian(x: Tensor, t: Tensor) -> Tensor:
    """E[noise | x_k] for data N(MEAN, STD^2)."""
    k = (t * 1000).round().long()
    a, s = (v[k].view(-1, 1, 1, 1) for v in (Ddpm().signal, Ddpm().sigma))
    return s * (x - a * MEAN) / (a**2 * STD**2 + s**2)


def curved(x: Tensor, t: Tensor) -> Tensor:
    """That and a bend, small near pure noise, as the data predicted from it is divided by a."""
    a = Ddpm().signal[(t * 1000).round().long()].view(-1, 1, 1, 1)
    return of_a_gaussian(x, t) + 0.3 * a * torch.sin(3 * x + 5 * a)


def test_training_is_diffusers():
    peer, flow, k = diffusers.DDPMScheduler(), Ddpm(), torch.tensor([0, 1, 500, 998, 999])
    assert torch.allclose(flow.signal**2, peer.alphas_cumprod.double(), rtol=1e-4, atol=0)  # it sums in float32
    peer.alphas_cumprod = flow.signal**2
    random = torch.Generator().manual_seed(0)
    data, noise = (torch.randn(5, 2, 3, 3, generator=random, dtype=torch.float64) for _ in range(2))
    assert torch.allclose(flow.mix(data, noise, k / 1000), peer.add_noise(data, noise, k), atol=1e-12)
    assert torch.equal(flow.target(data, noise), noise)


def test_training_times_are_whole_steps_evenly():
    times = Ddpm().sample_times(50_000, generator=torch.Generator().manual_seed(0))
    k = times * 1000
    assert torch.equal(k.round() / 1000, times)
    counts = torch.bincount(k.round().long(), minlength=1000)
    assert (len(counts), int(counts.min()) > 15, int(counts.max()) < 95) == (1000, True, True)
    assert torch.equal(Ddpm().shifted(torch.tensor([0.0, 0.0019, 0.9999])), torch.tensor([0, 0.001, 0.999]))


def by_diffusers(scheduler: Any, steps: int) -> Tensor:
    """The scheduler's own loop from noise START, at the products of betas in float64."""
    scheduler.set_timesteps(steps)
    x = START
    for k in scheduler.timesteps:
        x = scheduler.step(curved(x, (k.double() / 1000).expand(7)), k, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 20, 50])
def test_euler_is_ddim(steps: int):
    peer = diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    peer.alphas_cumprod = Ddpm().signal ** 2
    latents = Sampling("euler", steps).run(curved, START, Ddpm())
    assert (latents - by_diffusers(peer, steps)).abs().max() <= 1e-6


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 20])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpmpp_is_the_dpm_solver_of_noise_predictions(steps: int, order: int):
    peer = diffusers.DPMSolverMultistepScheduler(solver_order=order, timestep_spacing="trailing")
    peer.alphas_cumprod = Ddpm().signal ** 2
    peer.set_timesteps(steps)
    sigmas = (Ddpm().sigma / Ddpm().signal)[peer.timesteps]
    peer.set_timesteps = lambda _: setattr(peer, "sigmas", torch.cat([sigmas, torch.zeros(1)]))
    latents = Sampling({"name": "dpmpp", "order": order}, steps).run(curved, START, Ddpm())
    assert (latents - by_diffusers(peer, steps)).abs().max() <= 1e-6


def test_the_network_is_told_the_steps_it_was_trained_at():
    visited: list[Tensor] = []
    Sampling("dpmpp", 20).run(lambda x, t: visited.append(t) or curved(x, t), START, Ddpm())
    k = torch.stack(visited)[:, 0] * 1000
    assert torch.allclose(k, torch.arange(999, 0, -50).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("solver", sorted({*registry.TABLE["solver"]} - {"scm", "meanflow"}))  # those are for flows
def test_every_solver_brings_noise_to_the_data(solver: str):
    """A Gaussian keeps its standardised value."""
    latents = Sampling(solver, 200).run(lambda x, t: at_any_time(x, t), START, Ddpm())
    assert (latents - (MEAN + STD * START)).abs().max() < 0.03


def at_any_time(x: Tensor, t: Tensor) -> Tensor:
    """`of_a_gaussian`, linear between two steps."""
    low = (t * 1000).floor() / 1000
    part = ((t - low) * 1000).view(-1, 1, 1, 1)
    high = (low + 0.001).clamp(max=0.999)
    return (1 - part) * of_a_gaussian(x, low) + part * of_a_gaussian(x, high)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_kept(dtype: torch.dtype):
    latents = Sampling(steps=5).run(lambda x, t: curved(x, t).to(x), START.to(dtype), Ddpm())
    assert latents.dtype == dtype
    assert latents.isfinite().all()


def test_tables_made_on_the_meta_device_are_real():
    with torch.device("meta"):
        flow = Ddpm()
        assert not flow.times.is_meta


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 1001}, "steps is 1001, expected 1 to 1000"),
        ({"steps": 0}, "steps is 0"),
        ({"shift": 3.0}, r"sampling shift is 3\.0, but noise prediction has no shift"),
        ({"grid": "flow_match"}, "grid is 'flow_match'"),
    ],
)
def test_options_that_are_the_flows(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Sampling(**options).run(curved, START, Ddpm())
