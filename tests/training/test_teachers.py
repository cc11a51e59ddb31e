"""Methods against the experiment around them: teachers' text encoders and latents, guidance, and targets."""

import pytest

from sana_lab.config import experiments
from sana_lab.config.memo import reusing
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


def test_a_teacher_with_its_own_text_encoder():
    frozen = ["system.train_dit=false", f"system.dit={TEACHER}"]
    new = f"system.text_encoder={{name: adapter, encoder: '{TEACHER}', width: 96, layers: 1}}"

    def distill(text: str, *overrides: str) -> None:
        method = f"system.method={{name: distill, teacher: '{TEACHER}', text_encoder: {text}}}"
        checks.check(experiments.load("shapes_sana", [*frozen, new, method, *overrides]))

    distill(f"'{TEACHER}'")
    with pytest.raises(
        SpecError, match=r"has width 96, and the method's has 48; expected system\.method\.text_encoder: "
    ):
        distill("{name: llm, width: 48, layers: 3, heads: 3, max_tokens: 32}")
    with pytest.raises(SpecError, match=r"with another text_encoder than the method's, of weights None"):
        distill("{name: llm, width: 96, layers: 3, heads: 3, max_tokens: 32}")
    with pytest.raises(
        SpecError, match=r"expected system\.text_encoder or system\.method\.text_encoder: experiment:shapes_sana"
    ):
        distill("null")
    with pytest.raises(SpecError, match="width 192 and 5 blocks, and the DiT has width 192 and 4 blocks"):
        distill(f"'{TEACHER}'", "system.dit={name: sana, dim: 192, depth: 4, cross_heads: 6}", "system.train_dit=true")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["system.text_encoder=adapter"],
            r"system\.text_encoder\.encoder 'llm' is frozen and has not learned anything",
        ),
        (["system.train_dit=false"], "the DiT has no weights; expected system.dit: experiment:NAME, or parent.weights"),
        (
            [
                "system.train_dit=false",
                f"parent.weights={TEACHER}",
                "parent.fit=partial",
                "system.text_encoder.width=48",
            ],
            r"has no dit\.caption_embed\.mlp\.0\.weight of shape \(192, 48\), which does not train here, nor 0 others",
        ),
        (
            [f"system.text_encoder={{name: adapter, encoder: '{TEACHER}'}}", "system.text_encoder.encoder.width=48"],
            r"network\.embed_tokens\.weight is \(\d+, 96\), expected \(\d+, 48\)",
        ),
    ],
)
def test_parts_that_stay_as_they_are_without_weights(overrides: list[str], message: str):
    with pytest.raises(SpecError, match=message):
        checks.check(experiments.load("shapes_sana", overrides))


def test_guidance_in_the_target_and_in_sampling():
    checks.check(experiments.load("shapes_meanflow"))
    with pytest.raises(SpecError, match=r"sampling.guidance is 3, .* holds a guidance of 3 already; expected .* 1"):
        checks.check(experiments.load("shapes_meanflow", ["sampling.guidance=3.0"]))


def test_two_methods_that_replace_the_target():
    loaded = experiments.load("shapes_sana", [MEAN, "system.method=[meanflow, meanflow]"])
    with pytest.raises(SpecError, match="methods 'meanflow' and 'meanflow_2' each replace the target"):
        checks.check(loaded)


def test_a_check_leaves_specs_that_are_reused_as_they_are():
    with reusing():
        for _ in range(2):
            teachers.check(experiments.load("shapes_meanflow"))
