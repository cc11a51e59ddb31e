"""The objectives: what is compared with what, and what the network is told of the time."""

import json

import pytest
import tiny
import torch
from torch import Tensor

from sana_lab.config import experiments, specs
from sana_lab.config.specs import SpecError
from sana_lab.diffusion import Process
from sana_lab.diffusion.ddpm import Ddpm
from sana_lab.diffusion.flow import Flow
from sana_lab.diffusion.sampling import Sampling, generator
from sana_lab.models.dit import Dit
from sana_lab.systems.losses import process, velocity_losses
from sana_lab.training.checks import check
from sana_lab.types import Text

TEXT = Text(torch.zeros(5, 1, 8), torch.ones(5, 1, dtype=torch.bool))
SMALL = [  # a head of zeros would hide what the network read
    f"system.dit={json.dumps({**tiny.DIT, 'zero_head': False})}",
    f"system.autoencoder={json.dumps(tiny.VAE)}",
    f"system.text_encoder={json.dumps(tiny.LLM)}",
]


class Oracle(Dit):
    """A denoiser that was told the data and how they are noised, and remembers the times that it saw."""

    channels, patch = 4, 1

    def __init__(self, data: Tensor, flow: Process) -> None:
        super().__init__()
        self.data, self.flow, self.seen = data, flow, []

    def forward(self, x: Tensor, t: Tensor, text: Text) -> Tensor:
        self.seen.append(t)
        noise = torch.zeros_like(x)
        start, end = self.flow.mix(self.data, noise, t), self.flow.mix(self.data, noise + 1, t)
        return self.flow.target(self.data, (x - start) / (end - start))


@pytest.mark.parametrize("flow", [Flow(), Ddpm()])
def test_the_loss_is_zero_for_the_target_and_its_square_for_nothing(flow: Process):
    """The target is noise - data, or with `Ddpm` the noise alone."""
    data = torch.randn(5, 4, 2, 2)
    torch.testing.assert_close(
        velocity_losses(Oracle(data, flow), flow, data, TEXT, generator(3)), torch.zeros(5), atol=1e-4, rtol=0
    )
    silent = Oracle(data, flow)
    silent.forward = lambda x, t, text: torch.zeros_like(x)
    noise = torch.randn(data.shape, generator=generator(3))
    target = noise if isinstance(flow, Ddpm) else noise - data
    torch.testing.assert_close(
        velocity_losses(silent, flow, data, TEXT, generator(3)), target.square().flatten(1).mean(1)
    )


def test_a_released_model_is_told_whole_thousandths_of_the_same_times():
    data = torch.randn(5, 4, 2, 2)
    exact, released = (Oracle(data, flow) for flow in (Flow(), Flow(model_time="released")))
    for dit in (exact, released):
        velocity_losses(dit, dit.flow, data, TEXT, generator(3))
    assert torch.equal(released.seen[0], (exact.seen[0].double() * 1000).floor().div(1000).float())
    assert not torch.equal(released.seen[0], exact.seen[0])


def test_options_choose_the_process():
    assert process("flow", 2.0, 0.999, "released") == Flow(2.0, 0.999, model_time="released")
    assert process("ddpm", 3.0, 1.0, "exact") == Ddpm()


@pytest.mark.parametrize("system", ["text2image", "dit"])
def test_the_objective_is_one_override_and_the_default_keeps_earlier_models(system: str):
    spec = {"name": system, "text_encoder": {"name": "llm", "width": 32, "layers": 1}}
    before = specs.canonical("system", spec)
    assert not {"objective", "model_time"} & before.keys()
    assert specs.canonical("system", {**spec, "objective": "ddpm"}) == {**before, "objective": "ddpm"}
    assert isinstance(specs.build("system", {**spec, "objective": "ddpm"}).flow, Ddpm)


def test_a_system_of_noise_predictions_draws_with_every_solver():
    torch.manual_seed(0)
    options = experiments.load("shapes", [*SMALL, "system.objective=ddpm"])["system"]
    system = specs.build("system", options).eval()
    for solver in ("euler", "dpmpp", "unipc"):
        images = system.sample(["a red ring", ""], size=16, sampling=Sampling(solver, 4, 3.0))
        assert (images.dtype, images.shape) == (torch.uint8, (2, 3, 16, 16))
        assert len(images.unique()) > 20


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sampling.shift=2.0", "noise prediction has no shift"),
        ("sampling.steps=1001", "expected 1 to 1000"),
        ("sampling.guidance_interval=[0.5, 0.1]", "guidance_interval is"),
    ],
)
def test_sampling_that_does_not_fit_the_objective_is_found_before_any_work(override: str, words: str):
    experiment = experiments.load(
        "shapes", [*SMALL, "data={name: shapes, size: 16}", "system.objective=ddpm", override]
    )
    with pytest.raises(SpecError, match=words):
        check(experiment)


class TestNull:
    """`null: nvlabs` reaches training and sampling; a cache of features cannot hold what it needs."""

    def test_training_sees_the_prompts_own_mask_over_the_null_condition(self):
        systems = []
        for null in ("diffusers", "nvlabs"):
            torch.manual_seed(0)
            options = experiments.load("shapes", [*SMALL, f"system.text_encoder.null={null}"])["system"]
            systems.append(specs.build("system", options).eval())
        with torch.no_grad():
            (a, mask_a), (b, mask_b) = (s.encode_text(["a red ring", "a"], [True, False]) for s in systems)
        assert mask_a.sum(1).tolist() == [1, 2]
        assert mask_b.sum(1).tolist() == [4, 2]
        assert torch.allclose(a[0, 0], b[0, 0], atol=1e-5)
        drawn = [s.sample(["a red ring"], size=16, sampling=Sampling("euler", 2, 4.0)) for s in systems]
        alone = [s.sample(["a red ring"], size=16, sampling=Sampling("euler", 2, 1.0)) for s in systems]
        assert not torch.equal(*drawn)
        assert torch.equal(*alone)

    def test_cached_features_are_refused(self):
        with pytest.raises(SpecError, match="null is 'nvlabs', which needs features of padding"):
            specs.build("system", {"name": "dit", "text_encoder": {"name": "llm", "null": "nvlabs"}})
