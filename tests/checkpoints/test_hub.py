"""Errors for paths and hub ids without a model."""

from pathlib import Path

import huggingface_hub
import pytest

from sana_lab.config.validation import SpecError
from sana_lab.pretrained import loading


def test_the_nearest_file_is_named(tmp_path: Path):
    (tmp_path / "model.pth").touch()
    with pytest.raises(SpecError, match=r"no file or folder .*modle.pth'; did you mean 'model.pth'"):
        loading.load(tmp_path / "modle.pth")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SpecError, match=r"holds nothing; expected model_index.json"):
        loading.load(tmp_path / "empty")


def test_a_hub_id_without_a_network_says_what_to_copy_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SpecError) as error:
        loading.load("Efficient-Large-Model/Sana_600M_512px_diffusers")
    for words in (
        "neither a file or folder here nor in the local Hugging Face cache",
        "hf download Efficient-Large-Model/Sana_600M_512px_diffusers --local-dir Sana_600M_512px_diffusers",
        "model_index.json, transformer/, vae/, text_encoder/, tokenizer/ and scheduler/",
    ):
        assert words in str(error.value)
