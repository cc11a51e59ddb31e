"""Systems of Lightning checkpoints: recognised by their options, rebuilt, and refused where they do not fit."""

from pathlib import Path

import pytest
import tiny
import torch

from sana_lab.config import experiments, specs
from sana_lab.config.validation import SpecError
from sana_lab.pretrained import restore
from sana_lab.systems import System
from sana_lab.training import train

SYSTEMS = {
    "autoencoder": {"autoencoder": tiny.VAE},
    "attributes": {"widths": [8, 8, 8]},
    "clip": {"width": 16, "layers": 1, "text_layers": 1, "heads": 2},
    "dit": {"text_encoder": tiny.LLM, "dit": tiny.DIT},
    "text2image": {"text_encoder": tiny.LLM, "dit": tiny.DIT},
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_is_recognised_by_its_options(name: str):
    system: System = specs.build("system", {"name": name, **SYSTEMS[name]})
    assert restore.system_with(dict(system.hparams), Path("a.ckpt")) == name


def test_options_of_no_system_are_refused():
    with pytest.raises(SpecError, match=r"no system .* options color"):
        restore.system_with({"color": 1}, Path("a.ckpt"))


def test_a_checkpoint_gives_the_average_and_must_fit(tmp_path: Path):
    system: System = specs.build("system", {"name": "autoencoder", **SYSTEMS["autoencoder"]})
    checkpoint = {"state_dict": dict(system.state_dict()), "hyper_parameters": dict(system.hparams)}
    system.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "a.ckpt")
    name = "autoencoder.encoder.stem.weight"
    loaded = restore.from_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(loaded.state_dict()[name], system.state_dict()[name])
    checkpoint["state_dict"].pop(name)
    torch.save(checkpoint, tmp_path / "b.ckpt")
    with pytest.raises(SpecError, match=f"AutoencoderSystem: {name} is missing"):
        restore.from_checkpoint(tmp_path / "b.ckpt")


def test_a_frozen_part_without_weights_is_that_of_the_training(here):
    """The tiny autoencoder is in no file: whatever was drawn before, it is the one that the latents were made with."""
    tiny.write_experiment(here, changes={"trainer.max_steps": 1, "prompts": [], "seed": 5})
    experiment = experiments.load("tiny")
    path = train.train(experiment)
    torch.manual_seed(5)
    expected = specs.build("system", experiment["system"]).part("autoencoder").state_dict()
    for before in (1, 2):
        torch.manual_seed(before)
        state = torch.random.get_rng_state()
        part = restore.restore(experiment, path).part("autoencoder").state_dict()
        assert all(torch.equal(part[name], tensor) for name, tensor in expected.items())
        assert torch.equal(torch.random.get_rng_state(), state)
