"""The time axis: training times against their distribution, the path by differences, the schedule by diffusers."""

import math

import pytest
import torch
from scipy import stats

from sana_lab.diffusion.flow import Flow
from sana_lab.diffusion.sampling import Sampling


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_path_runs_from_data_to_noise_along_the_target():
    flow, random = Flow(), generator()
    data, noise = (torch.randn(4, 2, 3, 3, generator=random, dtype=torch.float64) for _ in range(2))
    assert torch.equal(flow.mix(data, noise, torch.zeros(4)), data)
    assert torch.equal(flow.mix(data, noise, torch.ones(4)), noise)
    t = torch.rand(4, generator=random, dtype=torch.float64)
    slope = (flow.mix(data, noise, t + 1e-3) - flow.mix(data, noise, t - 1e-3)) / 2e-3
    assert torch.allclose(slope, flow.target(data, noise))


def test_mix_keeps_the_datas_dtype():
    data = torch.randn(2, 3, dtype=torch.bfloat16)
    assert Flow().mix(data, data, torch.rand(2)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("shift", "mean", "std"), [(1.0, 0.0, 1.0), (3.0, 0.0, 1.0), (3.0, -0.5, 1.4), (0.5, 1.0, 0.7)]
)
def test_times_are_logit_normal(shift: float, mean: float, std: float):
    """A shift s adds log s to the logit, so that logits are N(mean + log s, std^2)."""
    times = Flow(shift, logit_mean=mean, logit_std=std).sample_times(20_000, generator=generator()).double()
    expected = stats.norm(mean + torch.tensor(shift).log().item(), std)
    assert stats.kstest(torch.logit(times).numpy(), expected.cdf).pvalue > 0.01
    assert ((times > 0) & (times < 1)).all()


def test_uniform_times_are_uniform_before_the_shift():
    times = Flow(3.0, times="uniform").sample_times(20_000, generator=generator()).double()
    before = times / (3 - 2 * times)  # the shift's inverse
    assert stats.kstest(before.numpy(), "uniform").pvalue > 0.01


def test_times_depend_on_the_generator_alone():
    flow = Flow()
    assert torch.equal(flow.sample_times(5, generator=generator(1)), flow.sample_times(5, generator=generator(1)))
    assert not torch.equal(flow.sample_times(5, generator=generator(1)), flow.sample_times(5, generator=generator(2)))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers on numpy 2
@pytest.mark.parametrize("steps", [1, 2, 7, 20, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_schedule_is_diffusers_grid_of_the_released_models(steps: int, shift: float):
    from diffusers import DPMSolverMultistepScheduler

    peer = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    peer.set_timesteps(steps)
    ours = Flow(shift, start=0.999).schedule(steps)
    assert ours.shape == (steps + 1,)
    assert torch.allclose(ours, peer.sigmas.double(), rtol=0, atol=1e-7)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("steps", [1, 2, 7, 14, 20, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 4.0, 6.0])
def test_the_flow_match_grid_is_diffusers_euler(steps: int, shift: float):
    from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

    ours = Flow(shift).schedule(steps, "flow_match")
    assert (ours.dtype, ours.shape) == (torch.float64, (steps + 1,))
    for peer in (FlowMatchEulerDiscreteScheduler(shift=shift), FlowMatchHeunDiscreteScheduler(shift=shift)):
        peer.set_timesteps(steps)
        sigmas = (
            torch.cat([peer.sigmas[:1], peer.sigmas[2::2], peer.sigmas[-1:]])
            if len(ours) < len(peer.sigmas)
            else peer.sigmas
        )
        assert torch.allclose(ours, sigmas.double(), rtol=0, atol=1e-7)


# --- the network's times


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(("shift", "stride"), [(3.0, 1), (4.0, 5), (6.0, 5)])
def test_released_times_are_those_that_diffusers_hands_its_network(shift: float, stride: int):
    """For up to 1000 steps: the true times' thousandths, rounded down; diffusers slips where they are whole, by one."""
    from diffusers import DPMSolverMultistepScheduler

    peer = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    flow = Flow(shift, start=0.999, model_time="released")
    for steps in range(1, 1001, stride):
        peer.set_timesteps(steps)
        times = flow.schedule(steps)
        up, below = true_thousandths(steps, int(shift))
        whole = up % below == 0
        for dtype in (torch.float32, torch.float64):
            read = flow.velocity(lambda x, t: t, times)(torch.empty(0), times[:-1].to(dtype))
            assert read.dtype == dtype
            assert torch.equal(read, ((up // below).double() / 1000).to(dtype))
        assert torch.equal((up // below)[~whole], peer.timesteps[~whole])
        assert ((up // below - peer.timesteps)[whole] <= 1).all()


def true_thousandths(steps: int, shift: int) -> tuple[torch.Tensor, torch.Tensor]:
    """1000 times the released times, in whole numbers: the upper and the lower part of each fraction."""
    left = 999 * torch.arange(steps, 0, -1)
    return 1000 * shift * left, 1000 * steps + (shift - 1) * left


@pytest.mark.parametrize("name", ["dpmpp", "unipc"])
def test_a_solver_in_float32_reads_the_schedules_own_thousandths(name: str):
    """98 steps make 734.00000 of what is 733.99998."""
    flow, times = Flow(3.0, start=0.999, model_time="released"), list[float]()

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        times.append(t[0].item())
        return torch.zeros_like(x)

    Sampling(name, steps=98).run(network, torch.zeros(1, 1, 1, 1), flow)
    up, below = true_thousandths(98, 3)
    assert [round(1000 * t) for t in times] == (up // below).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_released_times_do_not_slip_at_whole_thousandths(dtype: torch.dtype):
    """0.7 in float32 lies below 7/10, and 0.999 (1 - 2/3) in float64 below 0.333, where diffusers slips to 332."""
    whole, flow = torch.arange(1001, dtype=torch.float64) / 1000, Flow(model_time="released")
    for around in (whole, whole.nextafter(torch.tensor(0.0)), whole.nextafter(torch.tensor(1.0))):
        assert torch.equal(flow.network_times(around.to(dtype)), whole.to(dtype))
    below = (whole[1:] - 1e-6).to(dtype)
    assert torch.equal(flow.network_times(below), whole[:-1].to(dtype))
    third = Flow(1.0, 0.999, model_time="released")
    assert (third.network_times(third.schedule(3)) * 1000).round().tolist() == [999, 666, 333, 0]


def test_exact_times_are_handed_on_untouched():
    t = torch.rand(5)
    assert Flow().network_times(t) is t


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_schedule_falls_from_noise_to_data(shift: float):
    times = Flow(shift).schedule(10)
    assert times.dtype == torch.float64
    assert (times[0], times[-1]) == (1, 0)
    assert (times.diff() < 0).all()


def test_shift_one_is_uniform():
    assert torch.allclose(Flow(1.0).schedule(4), torch.tensor([1, 0.75, 0.5, 0.25, 0]).double())


@pytest.mark.parametrize("steps", [0, -3])
def test_schedules_need_a_step(steps: int):
    with pytest.raises(ValueError, match=f"steps is {steps}, expected at least 1"):
        Flow().schedule(steps)


@pytest.mark.parametrize("wrong", [{"shift": 0.0}, {"shift": -1.0}, {"start": 0.0}, {"start": 1.5}])
def test_shift_and_start_have_a_range(wrong: dict[str, float]):
    with pytest.raises(ValueError, match="expected shift > 0 and 0 < start <= 1"):
        Flow(**wrong)


# --- prediction of the data, weights of the loss


def test_predicted_data_are_the_velocity_divided_by_the_time():
    """(x_t - output) / t, for which the true data give the target."""
    flow, random = Flow(prediction="data"), generator()
    data, noise, output = (torch.randn(5, 2, 3, 3, generator=random, dtype=torch.float64) for _ in range(3))
    t = torch.tensor([0.06, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    for i in range(5):
        expected = (flow.mix(data, noise, t)[i] - output[i]) / t[i]
        torch.testing.assert_close(flow.as_target(output, data, noise, t)[i], expected)
    torch.testing.assert_close(flow.as_target(data, data, noise, t), flow.target(data, noise))
    assert Flow().as_target(output, data, noise, t) is output


def test_the_error_of_data_near_time_zero_is_divided_by_the_smallest_time():
    flow, data = Flow(prediction="data"), torch.zeros(2, 1, 1, 1)
    error = flow.as_target(data + 0.1, data, data, torch.tensor([1e-4, 0.05]))
    torch.testing.assert_close(error.flatten(), torch.tensor([-2.0, -2.0]))


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp", "unipc", "rf_solver"])
def test_a_network_that_predicts_the_data_samples_them(solver: str):
    data = torch.randn(2, 4, 3, 3, generator=generator(1))
    noise = torch.randn(2, 4, 3, 3, generator=generator(2))
    result = Sampling(solver=solver, steps=4).run(lambda x, t: data, noise, Flow(prediction="data"))
    torch.testing.assert_close(result, data, atol=1e-4, rtol=1e-4)


def test_rounded_times_reach_a_network_that_predicts_the_data():
    seen: list[float] = []

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(1000 * float(t[0]))
        return torch.zeros_like(x)

    flow = Flow(prediction="data", model_time="released")
    Sampling(solver="dpmpp", steps=7).run(network, torch.zeros(1, 1, 1, 1), flow)
    assert len(seen) == 7
    assert all(value == pytest.approx(round(value), abs=1e-3) for value in seen)


@pytest.mark.parametrize("t", [0.01, 0.3, 0.5, 0.99])
def test_weights_of_the_loss_are_their_formulas(t: float):
    times = torch.tensor([t], dtype=torch.float64)
    cosmap, snr = Flow(weighting="cosmap").weights(times), Flow(weighting="min_snr").weights(times)
    assert cosmap is not None
    assert snr is not None
    assert float(cosmap) == pytest.approx(2 / math.pi / (1 - 2 * t + 2 * t * t))
    assert float(snr) == pytest.approx(t**2 * min(((1 - t) / t) ** 2, 5.0))  # of the velocity's error: data's over t^2
    assert Flow().weights(times) is None
