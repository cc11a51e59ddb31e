"""Methods against the experiment around them: teachers' text encoders and latents, guidance, and targets."""

import pytest

from sana_lab.config import experiments
from sana_lab.config.specs import SpecError
from sana_lab.training import checks, teachers

TEACHER = "experiment:shapes_sana"
MEAN = "system.dit.mean_velocity=true"


def test_a_text_encoder_without_the_teachers_weights_is_refused():
    loaded = experiments.load(
        "shapes_sana", [MEAN, "system.train_text=false", f"system.method={{name: meanflow, teacher: '{TEACHER}'}}"]
    )
    with pytest.raises(SpecError, match=r"trained with another text_encoder .* weights None; expected"):
        checks.check(loaded)


def test_parts_that_are_not_the_teachers():
    teachers.check(experiments.load("shapes_meanflow"))
    for override, message in {
        "system.autoencoder.weights=experiment:shapes_sana": None,
        "system.autoencoder.latent=16": r"whose autoencoder has latent 32, and the model's has 16; expected system",
        "system.text_encoder.width=48": r"whose text_encoder has width 96, and the model's has 48; expected system",
        "system.autoencoder.weights=other.st": r"with another autoencoder than the model's, of weights 'other.st'",
    }.items():
        loaded = experiments.load("shapes_meanflow", [override])
        if message is None:
            teachers.check(loaded)
            continue
        with pytest.raises(SpecError, match=message):
            teachers.check(loaded)


def test_guidance_in_the_target_and_in_sampling():
    checks.check(experiments.load("shapes_meanflow"))
    with pytest.raises(SpecError, match=r"sampling.guidance is 3, .* holds a guidance of 3 already; expected .* 1"):
        checks.check(experiments.load("shapes_meanflow", ["sampling.guidance=3.0"]))


def test_two_methods_that_replace_the_target():
    loaded = experiments.load("shapes_sana", [MEAN, "system.method=[meanflow, meanflow]"])
    with pytest.raises(SpecError, match="methods 'meanflow' and 'meanflow_2' each replace the target"):
        checks.check(loaded)
