"""The verbs import and export, and the files that import writes."""

from pathlib import Path

import numpy as np
import pytest
import tiny_peers
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file
from tiny_peers import close, nvlabs_state, nvlabs_training, velocities

from sana_lab import __main__
from sana_lab.checkpoints import weights
from sana_lab.checkpoints.build import build
from sana_lab.config.validation import SpecError
from sana_lab.pretrained import imported, loading


def run(*words: str | Path) -> None:
    assert __main__.main([str(word) for word in words]) == 0


def test_import_and_export_of_a_pipeline(sana_folder: Path, here: Path, capsys: pytest.CaptureFixture[str]):
    """The imported file generates the folder's image; its export is sampled like the folder."""
    run("import", sana_folder, "--out", "sana.safetensors")
    assert "sana-lab sample 'a red circle' --out DIR --model sana.safetensors" in capsys.readouterr().out
    for model, out in ((sana_folder, "a"), ("sana.safetensors", "b")):
        run("sample", "a red circle", "--model", model, "--out", out, "--set", "sampling.steps=2")
    assert (here / "a/000-a-red-circle.png").stat().st_size > 300
    names = ["a/000-a-red-circle.png", "b/000-a-red-circle.png"]
    assert np.array_equal(*(np.asarray(Image.open(here / name)) for name in names))
    assert loading.load("sana.safetensors", "dit").spec["cross_heads"] == 2
    assert __main__.main(["import", str(sana_folder), "--out", "sana.safetensors"]) == 1
    assert "another --out" in capsys.readouterr().err
    run("export", "sana.safetensors", "out")
    assert "note: Prompts were read with an instruction" in capsys.readouterr().out
    assert loading.load("out").experiment["sampling"] == loading.load(sana_folder).experiment["sampling"]


def test_import_of_a_pth_is_weights_for_an_experiment(here: Path, capsys: pytest.CaptureFixture[str]):
    """The verb prints a spec that builds the model with its weights."""
    model = tiny_peers.sana_transformer()
    torch.save({"state_dict": nvlabs_state(model), **nvlabs_training({})}, here / "a.pth")
    hints = ("cross_heads=2", "attention.name=linear", "attention.head_dim=8")
    run("import", "a.pth", "--out", "dit.safetensors", "--set", *hints)
    printed = capsys.readouterr().out
    assert "taken: state_dict, the raw weights\n" in printed
    assert "left out: pos_embed, y_embedder.y_embedding, optimizer, scheduler, epoch, step, rng_state\n" in printed
    spec = OmegaConf.to_container(OmegaConf.create(printed.split("system\n")[1]))["dit"]
    assert set(spec) == {"name", "dim", "depth", "attention", "cross_heads", "weights"}
    assert close(*velocities(build("dit", spec, channels=8, text_dim=32), model))
    assert close(*velocities(loading.load("dit.safetensors"), model))
    assert weights.card(here / "dit.safetensors")["imported"] == "a.pth"


def test_the_labs_own_files_are_not_imported(here: Path, sana_folder: Path):
    shipped = weights.find("experiment:shapes_dcae_f32")
    with pytest.raises(SpecError, match="nothing to import: use it as it is, such as `weights: "):
        imported.write_import(shipped, here / "out.safetensors")
    torch.save({"hyper_parameters": {}, "average": {}}, here / "a.ckpt")
    with pytest.raises(SpecError, match=r"nothing to import: use it with `--model a.ckpt`"):
        imported.write_import("a.ckpt", here / "out.safetensors")


def test_a_file_may_not_name_code(tmp_path: Path, sana_folder: Path):
    card = imported.write_import(sana_folder, tmp_path / "a.safetensors", "dit")
    card["parts"]["dit"]["spec"]["attention"] = {"name": "os:system"}
    weights.write(tmp_path / "b.safetensors", load_file(tmp_path / "a.safetensors"), card)
    with pytest.raises(SpecError, match="'os:system', code from outside the lab"):
        loading.load(tmp_path / "b.safetensors")


def test_export_of_an_experiment(here: Path):
    run("export", "shapes_dcae_f32", "own")
    assert loading.load("own").spec["scale"] == 1.0
