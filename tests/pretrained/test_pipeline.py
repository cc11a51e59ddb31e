"""A SanaPipeline's folder as a system; folders that are incomplete, inconsistent or of another pipeline."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_peers
import torch
from tiny_peers import close, velocities

from sana_lab import __main__, api
from sana_lab.config import specs
from sana_lab.config.validation import SpecError
from sana_lab.pretrained import loading
from sana_lab.systems.text2image import TextToImage


def test_a_pipeline_is_a_frozen_system_with_its_spec(system: TextToImage, sana_folder: Path):
    assert isinstance(system, TextToImage)
    assert not system.training
    assert not any(p.requires_grad or p.is_meta for p in system.parameters())
    assert system.spec == specs.resolve("system", system.spec)
    assert system.dit.spec["cross_heads"] == 2
    assert system.text_encoder.spec["model"] == str(sana_folder)
    assert (system.flow.shift, system.flow.start, system.flow.model_time) == (3.0, 0.999, "released")
    assert system.experiment["sampling"]["solver"] == {"name": "dpmpp", "order": 2}
    assert system.experiment["data"]["size"] == 32


def test_the_components_compute_what_diffusers_do(system: TextToImage, sana_folder: Path):
    pipe = tiny_peers.sana_pipeline()
    assert close(*velocities(system.dit, pipe.transformer))
    images = torch.randn(2, 3, 32, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = pipe.vae.encode(images).latent * pipe.vae.config.scaling_factor
        assert close(system.autoencoder.encode(images), latents)
        assert close(system.autoencoder.decode(latents), pipe.vae.decode(latents / 0.41407).sample)
    text = system.text_encoder.without_instruction(["A red circle "])
    tokens, mask, *_ = pipe.encode_prompt("A red circle ", do_classifier_free_guidance=False, max_sequence_length=300)
    real = mask.bool()
    assert text.mask.sum() == real.sum() == 4
    assert close(text.tokens[text.mask], tokens[real])


def test_one_component_of_a_pipeline(sana_folder: Path):
    for kind, name in (("dit", "sana"), ("autoencoder", "dcae"), ("text_encoder", "llm")):
        part = loading.load(sana_folder, kind)
        assert part.spec["name"] == name
        assert not part.training
    assert loading.load(sana_folder / "transformer").spec == loading.load(sana_folder, "dit").spec
    with pytest.raises(SpecError, match=r"vae holds a autoencoder \(dcae\), and a dit was asked for"):
        loading.load(sana_folder / "vae", "dit")


def test_overrides_of_a_pipeline(sana_folder: Path):
    system = api.load(str(sana_folder), ["sampling.steps=2", "text_encoder.instruction=sana_lab"])
    assert system.experiment["sampling"]["steps"] == 2
    with pytest.raises(SpecError, match=r"only sampling.\* can change"):
        api.load(str(sana_folder), ["system.dit.depth=1"])


@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_pipeline_of_one_variant(tmp_path: Path, is_sharded: bool):
    """All components in fp16 files; with others beside them `variant` chooses."""
    pipe = tiny_peers.sana_pipeline()
    options: dict[str, Any] = {"max_shard_size": "100KB"} if is_sharded else {}
    for part in (pipe.text_encoder, pipe.transformer, pipe.vae):
        part.half()
    folder = tiny_peers.saved(pipe, tmp_path / "p", variant="fp16", **options)
    assert list((folder / "text_encoder").glob("model*fp16*"))
    assert next(loading.load(folder).text_encoder.parameters()).dtype == torch.float16
    tiny_peers.saved(tiny_peers.gemma(), folder / "text_encoder")
    whole, half = (loading.load(folder, variant=v).text_encoder.state_dict() for v in (None, "fp16"))
    assert all(torch.equal(v.half().to(v), half[k]) for k, v in whole.items())
    assert not all(torch.equal(v, half[k]) for k, v in whole.items())
    if not is_sharded:
        options = ["--model", str(folder), "--variant", "fp16", "--out", str(tmp_path / "out")]
        assert __main__.main(["sample", "a red circle", *options, "--set", "sampling.steps=1"]) == 0


def test_a_pipeline_loads_without_diffusers_and_with_another_instruction(
    sana_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    system = loading.load(sana_folder)
    with pytest.raises(SpecError, match=r"--set text_encoder.instruction=file:PATH"):
        system.text_encoder(["a red circle"])
    assert api.load(str(sana_folder), ["text_encoder.instruction=sana_lab"]).text_encoder(["a red circle"]).mask.any()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("FluxPipeline", "FluxPipeline, another architecture; the lab reads SanaPipeline and SanaSprintPipeline"),
        ("StableDiffusion3Pipeline", "StableDiffusion3Pipeline, another architecture"),
        ("PixArtSigmaPipeline", "PixArtSigmaPipeline, another architecture"),
        ("SanaSprintPipeline", "SanaSprintPipeline has transformer, vae"),
        ("SanaPAGPipeline", "perturbed-attention guidance, .*kind='dit'"),
    ],
)
def test_pipelines_of_another_architecture(tmp_path: Path, name: str, message: str):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(SpecError, match=message):
        loading.load(tmp_path)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("tokenizer", "lacks tokenizer/; a SanaPipeline has transformer, vae, text_encoder, tokenizer, scheduler"),
        ("scheduler", "lacks scheduler/"),
        ("tokenizer/tokenizer.json", "tokenizer"),
        (
            "transformer/diffusion_pytorch_model.safetensors",
            "transformer lacks its weights; expected diffusion_pytorch_model",
        ),
        ("vae/config.json", "vae holds diffusion_pytorch_model.safetensors; expected model_index.json, config.json"),
        ("text_encoder/model.safetensors", "lacks a text model's config, weights or tokenizer"),
    ],
)
def test_an_incomplete_pipeline(tmp_path: Path, sana_folder: Path, missing: str, message: str):
    folder = shutil.copytree(sana_folder, tmp_path / "p")
    shutil.rmtree(folder / missing) if (folder / missing).is_dir() else (folder / missing).unlink()
    with pytest.raises(SpecError, match=message):
        loading.load(folder)


def test_components_that_do_not_fit_each_other(tmp_path: Path, sana_folder: Path):
    folder = shutil.copytree(sana_folder, tmp_path / "p")
    for changes, message in (
        ({"in_channels": 4, "out_channels": 4}, "the transformer takes latents of 4 channels, and the vae makes 8"),
        ({"caption_channels": 48}, "the transformer reads text 48 wide, and the text encoder makes it 32"),
    ):
        shutil.rmtree(folder / "transformer")
        tiny_peers.saved(tiny_peers.sana_transformer(**changes), folder / "transformer")
        with pytest.raises(SpecError, match=message):
            loading.load(folder)
