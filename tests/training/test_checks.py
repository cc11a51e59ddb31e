"""What is said of an experiment before any work: ranges, devices, files that are absent, weights of other shapes."""

import re
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file

from sana_lab.config import experiments
from sana_lab.config.specs import SpecError
from sana_lab.training import checks, train


@pytest.fixture
def folder(here: Path) -> Path:
    """Two experiments, `tiny` and `squeeze`, and weights of the autoencoder, right, narrow and cut short."""
    tiny.write_experiment(here, changes={"data.size": 16})
    tiny.write_experiment(here, "squeeze", tiny.SQUEEZE)
    save_file(tiny.autoencoder().state_dict(), here / "right.safetensors")
    save_file(tiny.autoencoder(latent=2).state_dict(), here / "narrow.safetensors")
    (here / "cut.safetensors").write_bytes((here / "right.safetensors").read_bytes()[:3000])
    return here


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.max_steps=-1", "trainer.max_steps is -1 (int), expected int in [0, "),
        ("trainer.log_every=0", "trainer.log_every is 0 (int), expected int in [1, "),
        ("trainer.validate_every=0", "trainer.validate_every is 0 (int), expected int in [1, "),
        ("trainer.checkpoint_every=0", "trainer.checkpoint_every is 0 (int), expected int in [1, "),
        ("trainer.accumulate=0", "trainer.accumulate is 0 (int), expected int in [1, "),
        ("trainer.gradient_clip=-1", "trainer.gradient_clip is -1 (int), expected float in [0, "),
        ("trainer.threads=0", "trainer.threads is 0 (int), expected int in [1, "),
        ("trainer.devices=0", "trainer.devices is 0, expected auto, a number"),
        ("trainer.devices=all", "trainer.devices is 'all', expected auto"),
        ("trainer.accelerator=cpuu", "did you mean 'cpu'"),
        ("system.optimizer.lr=abc", "system.optimizer.lr is 'abc' (str), expected float"),
        ("system.optimizer.lr=-1", "Invalid learning rate"),
        ("eval.prompts_per_task=0", "eval.prompts_per_task is 0 (int), expected int in [1, "),
        ("eval.batch=0", "eval.batch is 0 (int), expected int in [1, "),
        ("eval.bench_repeats=0", "eval.bench_repeats is 0"),
        ("eval.bench_size=100", "eval.bench_size 100 is not a multiple of 8 (autoencoder 8 x patch 1); the nearest is"),
        ("eval.fid_weights=rihgt.safetensors", "which is no file here; did you mean 'right.safetensors'"),
        ("system.autoencoder.weights=nofile.safetensors", "there is no weights file 'nofile.safetensors'"),
        ("system.autoencoder.weights=./nofolder", "there is no"),
        ("system.autoencoder.weights=cut.safetensors", "cut short"),
        ("system.autoencoder.weights=narrow.safetensors", "narrow.safetensors does not fit Vae: "),
        (
            "system.dit.attention.backend=triton",
            "blocks.0.attention has backend 'triton', which needs a CUDA device, not",
        ),
        ("system.dit.weights=right.safetensors", "right.safetensors does not fit Sana: "),
        ("system.autoencoder={name: 'experiment:squeeze', weights: none.safetensors}", "no weights file"),
    ],
)
def test_a_bad_setting_is_said_in_one_line_before_any_work(folder: Path, override: str, words: str):
    with pytest.raises(SpecError) as caught:
        checks.check(experiments.load("tiny", [override]))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("eval.seed=-1", "eval.seed is -1 (int), expected int in [0, "),
        ("eval.seed=99999999999999999999", "expected int in [0, 4294967295]"),
        ("eval.prompts_per_task=1000000000", "prompts_per_task is 1000000000 (int), expected int in [1, "),
        ("eval.images_per_prompt=-3", "eval.images_per_prompt is -3 (int), expected int in [1, "),
        ("eval.held_out=0", "eval.held_out is 0 (int), expected int in [1, "),
        ("eval.worst=-1", "eval.worst is -1 (int), expected int in [0, "),
        ("eval.measures=[{name: geneval, seed: -1}]", "eval.measures[0].seed is -1 (int), expected int in [0, "),
        ("eval.measures=[{name: distances, extractor: shapes, batch: 0}]", "eval.measures[0].batch is 0 (int)"),
    ],
)
def test_an_evaluation_out_of_range_is_found_while_the_experiment_loads(folder: Path, override: str, words: str):
    with pytest.raises(SpecError) as caught:
        experiments.load("tiny", [override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "trainer.max_steps=0",
        "trainer.threads=null",
        "trainer.devices='0,1'",
        "eval.bench_size=64",
        "eval.fid_weights=cut.safetensors",  # what it holds is looked at when it is used
        "system.autoencoder.weights=right.safetensors",
        "system.autoencoder.weights=owner/name",
        "system.autoencoder=experiment:squeeze",
    ],
)
def test_a_good_setting_passes(folder: Path, override: str):
    checks.check(experiments.load("tiny", [override]))


def test_weights_of_a_frozen_experiment_fit_once_it_is_trained(folder: Path):
    train.train(experiments.load("squeeze"))
    checks.check(experiments.load("tiny", ["system.autoencoder=experiment:squeeze"]))
    with pytest.raises(SpecError, match="experiment:squeeze does not fit Vae"):
        checks.check(experiments.load("tiny", ["system.autoencoder={name: 'experiment:squeeze', latent: 2}"]))


@pytest.mark.parametrize(("weights", "words"), [("narrow", "does not fit Vae"), ("none", "no weights file")])
def test_weights_that_data_are_made_with_are_looked_at_too(folder: Path, weights: str, words: str):
    squeeze = f"{{name: vae, widths: [8, 8, 8, 8], depth: 1, groups: 2, weights: {weights}.safetensors}}"
    source = "{name: shapes, size: 16}"
    override = f"data={{name: latents, items: 4, source: {source}, autoencoder: {squeeze}}}"
    with pytest.raises(SpecError, match=words):
        checks.check(experiments.load("tiny", [override]))


def test_released_weights_of_another_width_are_refused(folder: Path, sana_folder: Path):
    with pytest.raises(SpecError, match=r"has (dim|depth) .*, and the spec of the dit says"):
        checks.check(experiments.load("tiny", [f"system.dit.weights={sana_folder}"]))


def test_scaled_gradients_are_not_clipped_by_hand(folder: Path):
    tiny.write_experiment(folder, "squeeze", tiny.SQUEEZE)
    words = ["system.adversarial=0.1", "data.size=64", "data.batch=4"]
    checks.check(experiments.load("squeeze", [*words, "trainer.precision=bf16-mixed"]))
    with pytest.raises(SpecError, match="scaled gradients would be clipped; expected bf16-mixed"):
        checks.check(experiments.load("squeeze", [*words, "trainer.precision=16-mixed"]))


def test_a_distilled_denoiser_is_not_trained(folder: Path):
    with pytest.raises(SpecError, match=r"system.dit.guidance is 0.1, .*expected trainer.max_steps=0, .*, not 4"):
        train.train(experiments.load("tiny", ["system.dit.guidance=0.1"]))
    checks.check_objective(experiments.load("tiny", ["system.dit.guidance=0.1", "trainer.max_steps=0"]))
    checks.check_objective(experiments.load("sana_sprint_1600m_1024"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks for a missing GPU")
@pytest.mark.parametrize("name", ["cuda", "gpu", "mps"])
def test_a_device_that_is_not_there(folder: Path, name: str):
    if name == "mps" and torch.backends.mps.is_available():
        pytest.skip("it is there")
    with pytest.raises(SpecError, match=f"trainer.accelerator is '{name}', which this machine does not have"):
        checks.check(experiments.load("tiny", [f"trainer.accelerator={name}"]))


def test_what_experiments_take_weights_from_is_listed_innermost_first(folder: Path):
    write = "base: squeeze\nsystem: {autoencoder: 'experiment:squeeze'}\nseed: 1\n"
    (folder / "experiments/again.yaml").write_text(write)
    latents = "{name: latents, items: 4, source: {name: shapes, size: 16}, autoencoder: 'experiment:again'}"
    assert experiments.prerequisites(experiments.load("tiny", [f"data={latents}"])) == ["squeeze", "again"]
    assert experiments.prerequisites(experiments.load("tiny")) == []


@pytest.mark.parametrize(
    ("able", "machine", "warns"), [(False, "x86_64", True), (True, "x86_64", False), (False, "aarch64", False)]
)
def test_bfloat16_on_a_cpu_without_it_is_a_warning(able, machine, warns, monkeypatch, recwarn):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: able)
    monkeypatch.setattr(checks.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    checks.warn_slow_precision({"accelerator": "auto", "max_steps": 1, "precision": "32-true"})
    assert not recwarn
    checks.warn_slow_precision({"accelerator": "auto", "max_steps": 1, "precision": "bf16-mixed"})
    assert [str(w.message) for w in recwarn if "trainer.precision=32-true" in str(w.message)] == [
        str(w.message) for w in recwarn
    ]
    assert len(recwarn) == warns


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks for a missing GPU")
@pytest.mark.parametrize(
    ("overrides", "devices", "words"),
    [
        (["trainer.accelerator=gpu"], 1, "trainer.accelerator is 'gpu', which this machine does not have"),
        (["system.dit.attention.backend=triton"], 1, "has backend 'triton', which needs a CUDA device"),
        (["trainer.strategy=fsdp2", "system.train_text=false", "trainer.accelerator=auto"], 2, "and there is 1;"),
    ],
)
def test_another_machine_is_not_asked_for_what_this_one_lacks(folder: Path, overrides, devices, words):
    """Its worker is."""
    experiment = experiments.load("tiny", overrides)
    checks.check(experiment, elsewhere=devices)
    with pytest.raises(SpecError, match=re.escape(words)):
        checks.check_here(experiment)
    with pytest.raises(SpecError, match=re.escape(words)):
        checks.check(experiment)
