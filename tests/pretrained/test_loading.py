"""`load` of the lab's own files, and which names mean a model."""

import shutil
from pathlib import Path

import pytest

from sana_lab.checkpoints import weights
from sana_lab.config.validation import SpecError
from sana_lab.pretrained import loading


def test_a_folder_with_the_name_of_an_experiment(here: Path, sana_folder: Path):
    (here / "photographs").mkdir()
    assert not loading.is_model("photographs")
    assert loading.is_model("./photographs")
    shutil.copy(sana_folder / "model_index.json", here / "photographs")
    assert loading.is_model("photographs")
    (here / "mine").mkdir()
    assert loading.is_model("mine")


def test_our_own_files(here: Path):
    """Shipped weights by their file, and a part of them; SpecError where their experiment has changed."""
    shipped = weights.find("experiment:shapes_vae_f8")
    system = loading.load(shipped)
    assert type(system).__name__ == "AutoencoderSystem"
    assert loading.load(shipped, "autoencoder").channels == system.autoencoder.channels
    with pytest.raises(SpecError, match="AutoencoderSystem, which has no dit"):
        loading.load(shipped, "dit")
    state, card = weights.read(shipped), weights.card(shipped)
    weights.write(here / "old.safetensors", state, {**card, "hash": "0" * 16})
    with pytest.raises(SpecError, match="was trained as experiment 'shapes_vae_f8' with other settings"):
        loading.load("old.safetensors")
