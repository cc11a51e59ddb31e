"""Sampling options, and noise that depends on (seed, index) alone."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from sana_lab.config import experiments, hashing, registry, schema, specs
from sana_lab.config.specs import SpecError
from sana_lab.diffusion.ddpm import Ddpm
from sana_lab.diffusion.flow import Flow
from sana_lab.diffusion.sampling import (
    ROUNDING_SOLVERS,
    NoiseStreams,
    Overflow,
    Sampling,
    check_finite,
    generator,
    noise_like,
)
from sana_lab.diffusion.solvers import dpmpp, euler
from sana_lab.training import checks

SHAPE = (4, 3, 5)


def toward_zero(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x) * (1 + t.view(-1, 1, 1, 1))


# --- noise


def test_noise_depends_on_seed_and_index_alone():
    """Not on the batch, its order, or what was drawn before."""
    batch = noise_like(SHAPE, 7, [0, 1, 2, 3])
    assert batch.shape == (4, *SHAPE)
    torch.manual_seed(123)
    torch.randn(1000)
    assert torch.equal(noise_like(SHAPE, 7, [2]), batch[2:3])
    assert torch.equal(noise_like(SHAPE, 7, [3, 1]), batch[[3, 1]])


def test_drawing_noise_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    noise_like(SHAPE, 0, [0, 1])
    assert torch.equal(torch.randn(3), expected)


def test_seed_and_index_are_not_interchangeable():
    keys = [(seed, index) for seed in (-1, 0, 1, 2, 2**40) for index in range(400)]
    firsts = {tuple(torch.randn(2, generator=generator(*key)).tolist()) for key in keys}
    assert len(firsts) == len(keys)


def test_longer_keys_are_other_keys():
    draws = [torch.rand(1, generator=generator(*key)).item() for key in ((), (0,), (0, 0), (0, 0, 0), (1,), (0, 1))]
    assert len(set(draws)) == len(draws)


def test_noise_is_standard_normal_and_uncorrelated():
    noise = noise_like((200,), 3, range(200))
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 0.01
    rows, columns = (np.corrcoef(a) - np.eye(200) for a in (noise.numpy(), noise.numpy().T))
    assert np.abs(rows).max() < 0.4  # 5.6 standard deviations of 20,000 pairs
    assert np.abs(columns).max() < 0.4


def test_streams_of_an_image_depend_on_seed_and_index_alone():
    """Their first noise is `noise_like`'s; the next is another, the same in any batch."""
    batch, alone = NoiseStreams(SHAPE, 7, [0, 1, 2]), NoiseStreams(SHAPE, 7, [2])
    first, second = (batch(), alone()), (batch(), alone())
    assert torch.equal(first[0], noise_like(SHAPE, 7, [0, 1, 2]))
    for many, one in (first, second):
        assert torch.equal(many[2:], one)
    assert not torch.equal(first[0], second[0])


# --- options


def test_a_solver_that_adds_noise_is_given_it():
    noise, sampling = noise_like(SHAPE, 0, [0]), Sampling("scm", 3)
    assert [name for name in registry.TABLE["solver"] if Sampling(name).adds_noise] == ["scm"]
    with pytest.raises(ValueError, match="solver 'scm' adds noise between steps"):
        sampling.run(toward_zero, noise, Flow())
    latents = sampling.run(toward_zero, noise, Flow(), fresh=NoiseStreams(SHAPE, 1, [0]))
    assert not torch.equal(latents, sampling.run(toward_zero, noise, Flow(), fresh=NoiseStreams(SHAPE, 2, [0])))


def test_times_of_scm_are_its_own():
    assert torch.equal(Sampling("scm", 2).times(Flow(1.0)), Sampling("scm", 2).times(Flow(6.0, 0.9)))
    assert Sampling("scm", 1).times(Flow()).tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="scm' has times of its own, and shift None and grid 'flow_match'"):
        Sampling("scm", grid="flow_match").times(Flow())
    with pytest.raises(ValueError, match="scm' begins at pure noise"):
        Sampling("scm").times(Ddpm())


def test_run_is_the_solver_on_the_flows_schedule():
    noise, flow = noise_like(SHAPE, 0, [0, 1]), Flow(2.0, 0.999)
    latents = Sampling(solver="euler", steps=6).run(toward_zero, noise, flow)
    assert torch.equal(latents, euler(toward_zero, noise, flow.schedule(6)))


def test_solver_options_and_a_shift_of_its_own():
    noise = noise_like(SHAPE, 0, [0])
    sampling = Sampling(solver={"name": "dpmpp", "order": 1}, steps=5, shift=6.0)
    expected = dpmpp(toward_zero, noise, Flow(6.0, 0.999).schedule(5), order=1)
    assert torch.equal(sampling.run(toward_zero, noise, Flow(2.0, 0.999)), expected)


def test_released_time_reaches_the_solvers_that_round_it_in_diffusers():
    flow, noise = Flow(3.0, 0.999, model_time="released"), noise_like(SHAPE, 0, [0])
    for solver in sorted(registry.TABLE["solver"]):
        visited: list[float] = []
        model = lambda x, t, visited=visited: visited.append(1000 * t[0, ...].max().item()) or x  # noqa: E731
        Sampling(solver, 5).run(model, noise, flow, fresh=lambda: noise)
        whole = all(abs(t - round(t)) < 1e-3 for t in visited)
        assert whole == (solver in ROUNDING_SOLVERS) == (solver in ("dpmpp", "unipc"))


def test_a_shift_of_its_own_keeps_the_flows_other_options():
    flow = Flow(2.0, 0.999, model_time="released")
    assert flow.with_shift(6.0) == Flow(6.0, 0.999, model_time="released")
    assert torch.equal(Sampling(shift=6.0).times(flow), flow.with_shift(6.0).schedule(20))


def test_later_options_leave_earlier_trials_their_key():
    """Unless they are used."""
    experiment = experiments.load("shapes_sana")
    plain = schema.Trial({}, 0, experiment)
    old = {k: v for k, v in experiment["sampling"].items() if k in ("solver", "steps", "guidance", "shift")}
    assert hashing.trial_hash(plain) == hashing.trial_hash(schema.Trial({}, 0, {**experiment, "sampling": old}))
    for name, value in (("guidance_interval", [0.2, 0.8]), ("grid", "flow_match")):
        changed = {**experiment, "sampling": experiments.check_sampling({**experiment["sampling"], name: value})}
        assert hashing.experiment_hash(changed) == hashing.experiment_hash(experiment)
        assert hashing.trial_hash(schema.Trial({}, 0, changed)) != hashing.trial_hash(plain)


@pytest.mark.parametrize("interval", [(0.5, 0.2), (-0.1, 0.5), (0.5, 1.1)])
def test_an_interval_rises_within_the_times_there_are(interval: tuple[float, float]):
    with pytest.raises(ValueError, match=r"guidance_interval is .*expected two times from 0"):
        Sampling(guidance_interval=interval)


def test_the_experiments_fields_are_these():
    """`config.SamplingOptions` repeats them, above the solvers."""
    ours, theirs = specs.fields(Sampling), specs.fields(schema.SamplingOptions)
    assert ours == theirs
    assert Sampling(**experiments.check_sampling({"steps": 3})).steps == 3


def test_wrong_solvers_and_steps():
    noise = noise_like(SHAPE, 0, [0])
    with pytest.raises(SpecError, match=r"no solver is called 'eulr'; did you mean 'euler'\?"):
        Sampling(solver="eulr").run(toward_zero, noise, Flow())
    with pytest.raises(ValueError, match="steps is 0, expected at least 1"):
        Sampling(steps=0).run(toward_zero, noise, Flow())


def module_solver(velocity, x, times, /, scale: float = 1.0):
    return scale * velocity(x, torch.full((len(x),), times[0].item()))


def no_latents(velocity, x, times, /):
    return velocity(x, times[:1]).mean()


def wide(velocity, x, times, /):
    return velocity(x, times[:1]).double()


def idle(velocity, x, times, /):
    return x


def test_a_solver_of_a_module_of_ones_own():
    solver = {"name": f"{__name__}:module_solver", "scale": 2.0}
    assert Sampling(solver=solver, steps=3).network_times(Flow()).tolist() == [1.0]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("no_latents", r"returned \(\) in float32"), ("wide", "in float64"), ("idle", "did not evaluate")],
)
def test_a_function_that_is_no_solver_is_refused_while_the_experiment_loads(name: str, reason: str):
    experiment = experiments.load("shapes_sana", [f"sampling.solver={__name__}:{name}"])
    with pytest.raises(SpecError, match=reason):
        checks.check(experiment)


# --- overflow


def test_finite_latents_are_as_they_were():
    x = torch.randn(SHAPE)
    assert check_finite(x, torch.float16) is x


def test_latents_that_are_not_finite_are_named():
    x = torch.zeros(7, 2, 2, 2)
    x[1, 0, 0, 0], x[4, 1, 1, 1] = torch.nan, -torch.inf
    for dtype, remedy in ((torch.float16, "denoiser in bfloat16"), (torch.bfloat16, "weights, the guidance")):
        with pytest.raises(Overflow, match=f"images 1, 4 of 7; .*{remedy}"):
            check_finite(x, dtype)
    with pytest.raises(Overflow, match="images 0, 1, 2, 3, 4 and 2 more of 7"):
        check_finite(torch.full((7, 1, 1, 1), torch.nan), torch.float32)
