"""Folders for diffusers: they run, their notes are complete, and models that diffusers lacks are refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny_peers import close, velocities
from torch import nn

from sana_lab import __main__
from sana_lab.config import specs
from sana_lab.config.validation import SpecError
from sana_lab.diffusion.ddpm import Ddpm
from sana_lab.diffusion.flow import Flow
from sana_lab.pretrained import export, loading
from sana_lab.systems.text2image import TextToImage


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' scheduler
@torch.no_grad()
def test_an_exported_pipeline_runs_in_diffusers(system: TextToImage, sana_folder: Path, tmp_path: Path):
    """Its tensors equal those of the loaded folder, and SanaPipeline generates the same image from both."""
    from diffusers import SanaPipeline

    notes = export.export(system, tmp_path / "out")
    assert ["complex_human_instruction" in note for note in notes] == [True]
    for name in ("transformer", "vae"):
        before, after = (
            load_file(f / name / "diffusion_pytorch_model.safetensors") for f in (sana_folder, tmp_path / "out")
        )
        assert before.keys() == after.keys()
        assert all(torch.equal(before[k], after[k]) for k in before)
    images = []
    for folder in (sana_folder, tmp_path / "out"):
        pipe = SanaPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
        pipe.set_progress_bar_config(disable=True)
        random = torch.Generator().manual_seed(0)
        options: dict[str, Any] = {"use_resolution_binning": False, "num_inference_steps": 3, "output_type": "np"}
        images.append(pipe("a red circle", height=32, width=64, generator=random, **options).images)
    assert images[0].std() > 0.05
    assert np.array_equal(*images)
    assert loading.load(tmp_path / "out").dit.spec == system.dit.spec


def test_a_model_of_our_own_is_exported(tmp_path: Path):
    """A Gemma from scratch, a DiT with our defaults, an autoencoder with one scale for all channels."""
    from diffusers import SanaPipeline

    spec: dict[str, Any] = {
        "name": "text2image",
        "dit": {**tiny.DIT, "base": 8},
        "autoencoder": {**tiny.DCAE, "scale": 0.5},
        "text_encoder": {**tiny.LLM, "max_tokens": 20},
    }
    own = specs.build("system", spec).eval()
    notes = export.export(own, tmp_path / "out")
    assert any("max_sequence_length" in note for note in notes)
    assert any("t = 0.999, the lab at 1" in note for note in notes)
    pipe = SanaPipeline.from_pretrained(tmp_path / "out", low_cpu_mem_usage=False)
    assert close(*velocities(own.dit, pipe.transformer))
    tokens, mask, *_ = pipe.encode_prompt("a red circle", do_classifier_free_guidance=False, max_sequence_length=20)
    text = own.text_encoder(["a red circle"])
    assert close(text.tokens[text.mask], tokens[mask.bool()])
    own.autoencoder.shift[0] = 0.7
    with pytest.raises(SpecError, match=r"shifts its latents, by up to 0.7, .*system.normalise=scale"):
        export.export(own, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": "softmax"}, "attention softmax and ffn mix of kernel 3"),
        ({"ffn": "mlp"}, "attention linear and ffn mlp of kernel none"),
        ({"cross_norm": True}, "or of neither"),
    ],
)
def test_parts_that_diffusers_lacks(tmp_path: Path, change: dict[str, Any], message: str):
    dit = tiny.dit(tiny.DIT, **change)
    with pytest.raises(SpecError, match=message):
        export.export(dit, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parts_alone_by_the_command_that_the_refusal_gives(tmp_path: Path, system: TextToImage, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(system, "flow", Ddpm())
    monkeypatch.setattr(loading, "open_model", lambda name: system)
    assert __main__.main(["export", "mine", "out"]) == 1
    refusal = capsys.readouterr().err
    command = refusal.partition("export a part alone: sana-lab ")[2].partition(" (")[0].split()
    assert command == ["export", "mine", "out", "--part", "dit"]
    assert __main__.main(command) == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["_class_name"] == "SanaTransformer2DModel"
    assert __main__.main([*command[:2], "vae", "--part", "autoencoder"]) == 0
    assert json.loads((tmp_path / "vae/config.json").read_text())["_class_name"] == "AutoencoderDC"
    with pytest.raises(SpecError, match="a Linear without dit cannot be exported"):
        export.export(nn.Linear(1, 1), tmp_path / "new", "dit")


def test_export_does_not_write_over_anything(tmp_path: Path, system: TextToImage):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SpecError, match="not empty"):
        export.export(system.dit, tmp_path)
    with pytest.raises(SpecError, match="a Linear cannot be exported"):
        export.export(nn.Linear(1, 1), tmp_path / "new")


def test_notes_on_sampling(system: TextToImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The scheduler gets the sampling's shift and order; a note names each option that it cannot express."""
    default = system.experiment["sampling"]
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "euler": ({"solver": "euler", "grid": "even", "shift": 5.0}, "grid of its own"),
        "interval": ({"guidance_interval": [0.2, 0.8]}, "guided from t 0.2 to 0.8 alone"),
        "unipc": ({"solver": {"name": "unipc", "order": 3}}, "samples with unipc, this folder with Flow-DPM-Solver"),
    }
    for name, (change, phrase) in cases.items():
        monkeypatch.setitem(system.experiment, "sampling", {**default, **change})
        monkeypatch.setitem(system.experiment, "data", {"size": 48})
        notes = export.export(system, tmp_path / name)
        assert [phrase in note for note in notes].count(True) == 1, notes
        scheduler = json.loads((tmp_path / name / "scheduler/scheduler_config.json").read_text())
        assert scheduler.get("shift", scheduler.get("flow_shift")) == change.get("shift", 3.0)
        assert scheduler.get("solver_order", 2) == 2
        assert json.loads((tmp_path / name / "transformer/config.json").read_text())["sample_size"] == 12
        assert "height=48, width=48" in (tmp_path / name / "README.md").read_text()
    monkeypatch.setattr(system.text_encoder, "null", "nvlabs")
    monkeypatch.setattr(system, "flow", Flow(2.0, 1.0))
    notes = export.export(system, tmp_path / "own")
    for phrase in ("(nvlabs)", "the lab at 1.", "rounded down to 1/1000, the lab exact"):
        assert phrase in "\n".join(notes)


def test_predictions_of_the_data_are_no_pipeline(system: TextToImage, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(system, "flow", Flow(prediction="data"))
    with pytest.raises(SpecError, match="this system predicts data; export a part alone"):
        export.export(system, tmp_path / "out")
