"""Released weights in their own file formats, at toy size: what is loaded equals diffusers, and goes back to it."""

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import tiny_peers
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sana_lab import __main__, api
from sana_lab.checkpoints import formats, key_tables, nvlabs, rename_keys, weights
from sana_lab.checkpoints.build import build
from sana_lab.config import specs
from sana_lab.config.specs import SpecError
from sana_lab.diffusion.flow import Flow
from sana_lab.models.dit import Dit
from sana_lab.models.layers import sincos_positions
from sana_lab.pretrained import export, imported, loading, schedulers
from sana_lab.systems.text2image import TextToImage
from sana_lab.types import Text

PART = dict[str, Any]
HEADS: PART = {"cross_heads": 2, "attention": {"name": "linear", "head_dim": 8}}  # what a .pth 32 wide does not hold
T = torch.tensor([0.9, 0.35])


def transformer(folder: Path) -> nn.Module:
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel.from_pretrained(folder, low_cpu_mem_usage=False).eval()


@torch.no_grad()
def velocities(dit: Dit, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Ours and diffusers', on the same latents, times and text of two lengths."""
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(2, model.config.in_channels, 6, 8, generator=noise)
    text = Text(
        torch.randn(2, 7, model.config.caption_channels, generator=noise), torch.arange(7) < torch.tensor([[2], [7]])
    )
    theirs = model(
        x,
        encoder_hidden_states=text.tokens,
        encoder_attention_mask=text.mask.long(),
        timestep=1000 * T * model.config.timestep_scale,
    ).sample
    return dit(x, T, text), theirs


def same(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).norm() <= 1e-5 * theirs.norm())


NVLABS = {  # diffusers' names -> NVlabs', as both projects write them
    "patch_embed.": "x_embedder.",
    "caption_projection.linear_": "y_embedder.y_proj.fc",
    "caption_norm.": "attention_y_norm.",
    "time_embed.emb.timestep_embedder.linear_1.": "t_embedder.mlp.0.",
    "time_embed.emb.timestep_embedder.linear_2.": "t_embedder.mlp.2.",
    "time_embed.timestep_embedder.linear_1.": "t_embedder.mlp.0.",
    "time_embed.timestep_embedder.linear_2.": "t_embedder.mlp.2.",
    "time_embed.guidance_embedder.linear_1.": "cfg_embedder.mlp.0.",
    "time_embed.guidance_embedder.linear_2.": "cfg_embedder.mlp.2.",
    "time_embed.linear.": "t_block.1.",
    "proj_out.": "final_layer.linear.",
    "transformer_blocks.": "blocks.",
    ".attn1.to_out.0.": ".attn.proj.",
    ".attn2.to_out.0.": ".cross_attn.proj.",
    ".attn2.to_q.": ".cross_attn.q_linear.",
    ".attn1.norm_q.": ".attn.q_norm.",
    ".attn1.norm_k.": ".attn.k_norm.",
    ".attn2.norm_q.": ".cross_attn.q_norm.",
    ".attn2.norm_k.": ".cross_attn.k_norm.",
    ".ff.conv_inverted.": ".mlp.inverted_conv.conv.",
    ".ff.conv_depth.": ".mlp.depth_conv.conv.",
    ".ff.conv_point.": ".mlp.point_conv.conv.",
}
FUSED = {".attn1.to_q.": (".attn.qkv.", "qkv"), ".attn2.to_k.": (".cross_attn.kv_linear.", "kv")}


def nvlabs_state(model: nn.Module) -> dict[str, Tensor]:
    """NVlabs' state dict of a diffusers transformer: renamed, q, k and v in one tensor, two buffers more."""
    given, state = model.state_dict(), {}
    for key, value in given.items():
        if fused := next((f for start, f in FUSED.items() if start in key), None):
            first = f".to_{fused[1][0]}."
            value = torch.cat([given[key.replace(first, f".to_{x}.")] for x in fused[1]])
            key = key.replace(".attn1" + first, fused[0]).replace(".attn2" + first, fused[0])
        elif any(f".attn{i}.to_{x}." in key for i, x in ((1, "k"), (1, "v"), (2, "v"))):
            continue
        for theirs, ours in NVLABS.items():
            key = key.replace(theirs, ours)
        state["final_layer.scale_shift_table" if key == "scale_shift_table" else key] = value.clone()
    dim = given["caption_norm.weight"].shape[0]
    return state | {"pos_embed": torch.zeros(1, 64, dim), "y_embedder.y_embedding": torch.randn(300, 32)}


def baggage(state: dict[str, Tensor]) -> PART:
    """What NVlabs' training leaves beside the weights, numpy's random state included."""
    optimizer = {"state": {i: {"exp_avg": torch.zeros_like(v)} for i, v in enumerate(state.values())}}
    rng = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}
    return {"optimizer": optimizer, "scheduler": {"last_epoch": 3}, "epoch": 7, "step": 10, "rng_state": rng}


# --- a pipeline folder


@pytest.fixture(scope="module")
def system(sana_folder: Path) -> TextToImage:
    return loading.load(sana_folder)


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


def test_the_components_of_a_pipeline_are_diffusers(system: TextToImage, sana_folder: Path):
    pipe = tiny_peers.sana_pipeline()
    assert same(*velocities(system.dit, pipe.transformer))
    images = torch.randn(2, 3, 32, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = pipe.vae.encode(images).latent * pipe.vae.config.scaling_factor
        assert same(system.autoencoder.encode(images), latents)
        assert same(system.autoencoder.decode(latents), pipe.vae.decode(latents / 0.41407).sample)
    text = system.text_encoder.without_instruction(["A red circle "])
    tokens, mask, *_ = pipe.encode_prompt("A red circle ", do_classifier_free_guidance=False, max_sequence_length=300)
    real = mask.bool()
    assert text.mask.sum() == real.sum() == 4
    assert same(text.tokens[text.mask], tokens[real])


def test_one_component_of_a_pipeline(sana_folder: Path):
    for kind, name in (("dit", "sana"), ("autoencoder", "dcae"), ("text_encoder", "llm")):
        part = loading.load(sana_folder, kind)
        assert part.spec["name"] == name
        assert not part.training
    assert loading.load(sana_folder / "transformer").spec == loading.load(sana_folder, "dit").spec
    with pytest.raises(SpecError, match=r"vae holds a autoencoder \(dcae\), and a dit was asked for"):
        loading.load(sana_folder / "vae", "dit")


def test_a_pipeline_draws(sana_folder: Path, here: Path, capsys: pytest.CaptureFixture[str]):
    assert (
        __main__.main(
            ["sample", "a red circle", "--model", str(sana_folder), "--out", "out", "--set", "sampling.steps=2"]
        )
        == 0
    )
    assert (here / "out/000-a-red-circle.png").is_file()
    with pytest.raises(
        SpecError, match=r"which is as it is: of a system, sampling.\* alone can change, and of a pipeline text_encoder"
    ):
        api.load(str(sana_folder), ["system.dit.depth=1"])


@pytest.mark.parametrize(("name", "solver", "grid"), [("dpm", "dpmpp", "even"), ("euler", "euler", "flow_match")])
def test_the_scheduler_says_how_to_sample(tmp_path: Path, sana_folder: Path, name: str, solver: str, grid: str):
    folder = shutil.copytree(sana_folder, tmp_path / "p")
    shutil.rmtree(folder / "scheduler")
    tiny_peers.saved(tiny_peers.scheduler(name, 6.0), folder / "scheduler")
    system = loading.load(folder)
    assert system.flow.shift == 6.0
    assert (specs.name_of(system.experiment["sampling"]["solver"]), system.experiment["sampling"]["grid"]) == (
        solver,
        grid,
    )


# --- components


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"patch_size": 2, "interpolation_scale": 2.0},
        {"qk_norm": "rms_norm_across_heads", "timestep_scale": 0.001},
    ],
)
def test_a_transformer_folder(tmp_path: Path, changes: PART):
    model = tiny_peers.sana_transformer(**changes)
    dit = loading.load(tiny_peers.saved(model, tmp_path / "t"))
    assert same(*velocities(dit, model))
    assert dit.spec["name"] == "sana"


@pytest.mark.parametrize("how", ["sharded", "bin", "fp16 alone", "fp16 chosen", "sharded fp16"])
def test_the_files_of_a_component(tmp_path: Path, how: str):
    model = tiny_peers.sana_transformer()
    half = "fp16" in how
    options: PART = {"max_shard_size": "100KB"} if "sharded" in how else {}
    if how == "fp16 chosen":
        tiny_peers.saved(model, tmp_path / "t")
    model = model.half() if half else model
    folder = tiny_peers.saved(
        model, tmp_path / "t", safe_serialization=how != "bin", variant="fp16" if half else None, **options
    )
    assert len(list(folder.glob("*.safetensors"))) == {"sharded": 3, "sharded fp16": 2, "bin": 0, "fp16 chosen": 2}.get(
        how, 1
    )
    dit = loading.load(folder, variant="fp16" if how == "fp16 chosen" else None)
    assert {p.dtype for p in dit.parameters()} == {torch.float16 if half else torch.float32}
    assert same(*velocities(dit.float(), model.float()))
    if how == "fp16 chosen":
        with pytest.raises(SpecError, match=r"no weights of variant 'bf16'; there is: fp16, none"):
            loading.load(folder, variant="bf16")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "encoder_layers_per_block": (0, 1, 2),
            "decoder_layers_per_block": (0, 2, 1),
            "downsample_block_type": "pixel_unshuffle",
            "upsample_block_type": "pixel_shuffle",
            "decoder_norm_types": ("batch_norm", "batch_norm", "rms_norm"),
            "decoder_act_fns": ("relu", "relu", "silu"),
            "encoder_qkv_multiscales": ((), (), ()),
            "decoder_qkv_multiscales": ((), (), ()),
        },
        {
            "decoder_block_types": ("ResBlock",) * 3,
            "decoder_qkv_multiscales": ((), (), ()),
            "decoder_conv_act_fn": "silu",
        },
        {"encoder_qkv_multiscales": ((), (), (3, 5)), "decoder_qkv_multiscales": ((), (), (3, 5))},
    ],
    ids=["sana", "in", "lite", "two scales"],
)
@torch.no_grad()
def test_an_autoencoder_dc_folder_there_and_back(tmp_path: Path, changes: PART):
    model = tiny_peers.dc_autoencoder(**changes)
    ours = loading.load(tiny_peers.saved(model, tmp_path / "a"))
    images = torch.randn(2, 3, 16, 32, generator=torch.Generator().manual_seed(0))
    latents = model.encode(images).latent * 0.41407
    assert same(ours.encode(images), latents)
    assert same(ours.decode(latents), model.decode(latents / 0.41407).sample)
    assert export.export(ours, tmp_path / "b") == []
    back = type(model).from_pretrained(tmp_path / "b", low_cpu_mem_usage=False)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in back.state_dict().items())
    assert same(back.eval().decode(latents).sample, model.decode(latents).sample)


@torch.no_grad()
def normalised(part: Any, shift: bool) -> Any:
    """With a scale, and maybe a shift, for each channel, as training fits them."""
    random = torch.Generator().manual_seed(5)
    part.scale.copy_(0.2 + 3 * torch.rand(part.channels, generator=random))
    part.shift.copy_(torch.randn(part.channels, generator=random) * shift)
    return part.double().eval()


@pytest.mark.parametrize(
    ("kind", "changes", "shift"),
    [
        ("AutoencoderDC", {}, False),
        ("AutoencoderDC", {"latent_channels": 4}, False),
        ("AutoencoderKL", {}, True),
        ("AutoencoderKL", {"use_quant_conv": True, "use_post_quant_conv": True}, True),
    ],
)  # fmt: skip
@torch.no_grad()
def test_a_scale_of_each_channel_is_taken_into_the_convolutions(tmp_path: Path, kind: str, changes: PART, shift: bool):
    """At borders too: the latents, images and, of the KL autoencoder, deviations of the normalised model itself."""
    import diffusers

    make = tiny_peers.dc_autoencoder if kind == "AutoencoderDC" else tiny_peers.kl_autoencoder
    ours = normalised(loading.load(tiny_peers.saved(make(**changes), tmp_path / "a")), shift)
    assert export.export(ours, tmp_path / "b") == []
    theirs = getattr(diffusers, kind).from_pretrained(tmp_path / "b", low_cpu_mem_usage=False, dtype=torch.float64)
    assert theirs.config.scaling_factor == 1.0
    assert kind == "AutoencoderDC" or theirs.config.shift_factor is None
    images = torch.randn(1, 3, 16, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    encoded = theirs.encode(images)
    latents = encoded.latent if kind == "AutoencoderDC" else encoded.latent_dist.mean
    assert (ours.encode(images) - latents).abs().max() <= 1e-6 * latents.abs().max()  # diffusers' attention: float32
    image = theirs.decode(latents).sample
    assert (ours.decode(latents) - image).abs().max() <= 1e-6 * image.abs().max()
    if kind == "AutoencoderKL":
        deviation = (0.5 * ours.posterior(images)[1]).exp() * ours.scale[:, None, None]
        assert torch.allclose(encoded.latent_dist.std, deviation)
    back = loading.load(tmp_path / "b").double()
    assert torch.allclose(back.encode(images), ours.encode(images), rtol=1e-10)


@pytest.mark.parametrize("changes", [{}, {"use_quant_conv": True, "use_post_quant_conv": True, "shift_factor": None}])
@torch.no_grad()
def test_an_autoencoder_kl_folder_there_and_back(tmp_path: Path, changes: PART):
    model = tiny_peers.kl_autoencoder(**changes)
    ours = loading.load(tiny_peers.saved(model, tmp_path / "a"))
    images = torch.randn(2, 3, 16, 32, generator=torch.Generator().manual_seed(0))
    shift = model.config.shift_factor or 0.0
    latents = (model.encode(images).latent_dist.mean - shift) * 1.5305
    assert same(ours.encode(images), latents)
    assert same(ours.decode(latents), model.decode(latents / 1.5305 + shift).sample)
    export.export(ours, tmp_path / "b")
    back = type(model).from_pretrained(tmp_path / "b", low_cpu_mem_usage=False)
    assert (back.config.shift_factor, back.config.scaling_factor) == (changes.get("shift_factor", 0.0609), 1.5305)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in back.state_dict().items())


def test_the_first_kl_autoencoders_have_other_names(tmp_path: Path):
    model = tiny_peers.kl_autoencoder()
    folder = tiny_peers.saved(model, tmp_path / "a")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    for new, former in old.items():
        state = {k.replace(f"attentions.0.{new}.", f"attentions.0.{former}."): v for k, v in state.items()}
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    images = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        assert same(loading.load(folder).posterior(images)[0], model.encode(images).latent_dist.mean)


# --- NVlabs


@pytest.mark.parametrize("wrapped", ["state_dict", "raw", "module.", "old format", "safetensors"])
def test_nvlabs_checkpoint(tmp_path: Path, wrapped: str):
    model = tiny_peers.sana_transformer(interpolation_scale=None)
    state = nvlabs_state(model)
    path = tmp_path / "model.pth"
    if wrapped == "safetensors":
        path = tmp_path / "model.safetensors"
        save_file(state, path)
    elif wrapped == "raw":
        torch.save(state, path)
    elif wrapped == "module.":
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    else:
        torch.save(
            {"state_dict": state, **baggage(state)}, path, _use_new_zipfile_serialization=wrapped != "old format"
        )
    dit = loading.load(path, **HEADS)
    assert same(*velocities(dit, model))
    assert dit.spec == specs.resolve("dit", dit.spec)
    assert (dit.spec["depth"], dit.spec["patch"], dit.spec["position"], dit.channels) == (2, 1, "none", 8)


def test_a_repository_of_nvlabs_holds_one_pth(tmp_path: Path):
    model = tiny_peers.sana_transformer()
    (tmp_path / "checkpoints").mkdir()
    torch.save({"state_dict": nvlabs_state(model)}, tmp_path / "checkpoints" / "Sana_tiny.pth")
    assert same(*velocities(loading.load(tmp_path, **HEADS), model))


def test_averaged_weights_are_taken_where_there_are_any(tmp_path: Path):
    averaged, raw = tiny_peers.sana_transformer(), tiny_peers.scattered(tiny_peers.sana_transformer(), 9)
    states = {"state_dict": nvlabs_state(raw), "state_dict_ema": nvlabs_state(averaged)}
    torch.save(states, tmp_path / "both.pth")
    torch.save({**states, "state_dict_ema": None}, tmp_path / "raw.pth")
    assert same(*velocities(loading.load(tmp_path / "both.pth", **HEADS), averaged))
    assert same(*velocities(loading.load(tmp_path / "both.pth", ema=False, **HEADS), raw))
    assert same(*velocities(loading.load(tmp_path / "raw.pth", **HEADS), raw))
    with pytest.raises(SpecError, match="holds no state_dict_ema"):
        loading.load(tmp_path / "raw.pth", ema=True, **HEADS)


@pytest.mark.parametrize(("interpolation", "base"), [(1.0, 8), (2.0, 16)])
def test_positions_are_read_from_nvlabs_buffer(tmp_path: Path, interpolation: float, base: int):
    model = tiny_peers.sana_transformer(interpolation_scale=interpolation, sample_size=base)
    state = nvlabs_state(model)
    table = sincos_positions(base, base, 32, base, interpolation, torch.device("cpu"))
    torch.save({"state_dict": state | {"pos_embed": table.reshape(1, -1, 32).half()}}, tmp_path / "4k.pth")
    dit = loading.load(tmp_path / "4k.pth", **HEADS)
    assert (dit.spec["base"], dit.spec["interpolation"]) == (base, interpolation)
    assert same(*velocities(dit, model))
    torch.save({"state_dict": state | {"pos_embed": torch.randn(1, 64, 32)}}, tmp_path / "odd.pth")
    with pytest.raises(SpecError, match="expected the options position, base and interpolation"):
        loading.load(tmp_path / "odd.pth", **HEADS)


def test_sprint_and_1_5_are_seen_by_their_tensors(tmp_path: Path):
    model = tiny_peers.sana_transformer(guidance_embeds=True, qk_norm="rms_norm_across_heads")
    state = nvlabs_state(model)
    torch.save({"state_dict": state | {"logvar_linear.weight": torch.zeros(1, 32)}}, tmp_path / "sprint.pth")
    norm = {**HEADS["attention"], "qk_norm": True}
    dit = loading.load(tmp_path / "sprint.pth", **{**HEADS, "attention": norm})
    assert (dit.spec["guidance"], dit.spec["time_scale"], dit.spec["cross_norm"]) == (0.1, 1.0, True)
    assert dit.spec["cross_norm_eps"] == 1e-6
    assert dit.guidance_embed is not None
    with_norms = formats.recognise(tmp_path / "sprint.pth", cross_heads=2, attention={"head_dim": 8}).spec["attention"]
    assert with_norms == {"name": "linear", "head_dim": 8, "qk_norm": True}


@pytest.mark.parametrize(("width", "heads"), [(1152, 16), (2240, 20)])
def test_cross_attention_heads_follow_from_the_released_widths(width: int, heads: int):
    with torch.device("meta"):
        dit = specs.build("dit", {"name": "sana", "dim": width, "depth": 1}, channels=32, text_dim=2304)
    state = rename_keys.to_theirs(dit.state_dict(), key_tables.sana_nvlabs(dit.spec))
    spec, supplied = nvlabs.infer_spec(state, "a.pth", {})
    assert (spec["dim"], spec["cross_heads"], spec["attention"]["head_dim"]) == (width, heads, 32)
    assert supplied == {"channels": 32, "text_dim": 2304}


def test_other_widths_do_not_say_how_many_heads_nor_how_wide(tmp_path: Path):
    torch.save({"state_dict": nvlabs_state(tiny_peers.sana_transformer())}, tmp_path / "a.pth")
    said = r"a.pth is 32 wide.*16 of width 1152, 20 of width 2240.*options cross_heads and attention.head_dim"
    for hints in ({}, {"cross_heads": 2}, {"attention": {"head_dim": 8}}, {"cross_heads": 2, "attention": {}}):
        with pytest.raises(SpecError, match=said):
            loading.load(tmp_path / "a.pth", **hints)


def test_norms_alone_do_not_say_what_the_network_reads_of_the_time(tmp_path: Path):
    """SANA-1.5 has them and reads 1000 t, Sprint's teachers have them and read t."""
    state = nvlabs_state(tiny_peers.sana_transformer(qk_norm="rms_norm_across_heads"))
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    with pytest.raises(
        SpecError, match=r"norms q and k, and does not hold .*expected the option time_scale, 1000 or 1"
    ):
        loading.load(tmp_path / "a.pth", **HEADS)
    assert loading.load(tmp_path / "a.pth", **HEADS, time_scale=1.0).spec["time_scale"] == 1.0
    spec = specs.resolve("dit", {**formats.recognise(tmp_path / "a.pth", **HEADS, time_scale=1.0).spec})
    assert build("dit", {**spec, "weights": str(tmp_path / "a.pth")}, channels=8, text_dim=32) is not None
    wide = {"name": "sana", "dim": 2240, "depth": 1, "cross_heads": 20, "cross_norm": True}
    with torch.device("meta"):
        dit = specs.build("dit", {**wide, "attention": {"qk_norm": True}}, channels=32, text_dim=2304)
    found = formats.nvlabs_weights(rename_keys.to_theirs(dit.state_dict(), key_tables.sana_nvlabs(dit.spec)), "a.pth")
    assert found.spec["time_scale"] == 1000.0
    assert found.notes == ("time_scale: 1000 is taken, as in SANA-1.5; a teacher of Sprint has 1 (--set time_scale=1)",)


def test_an_option_is_laid_over_what_the_file_shows(tmp_path: Path):
    torch.save(
        {"state_dict": nvlabs_state(tiny_peers.sana_transformer(qk_norm="rms_norm_across_heads"))}, tmp_path / "a.pth"
    )
    spec = formats.recognise(tmp_path / "a.pth", cross_heads=2, attention={"head_dim": 8}, time_scale=1.0).spec
    assert spec["attention"] == {"name": "linear", "head_dim": 8, "qk_norm": True}


# --- out again


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' scheduler
@torch.no_grad()
def test_an_exported_pipeline_runs_in_diffusers(system: TextToImage, sana_folder: Path, tmp_path: Path):
    """The folder's tensors are those that came in, and SanaPipeline draws the same image from both."""
    from diffusers import SanaPipeline

    notes = export.export(system, tmp_path / "out")
    assert ["complex_human_instruction" in note for note in notes] == [True]
    for name in ("transformer", "vae"):
        before, after = (
            load_file(f / name / "diffusion_pytorch_model.safetensors") for f in (sana_folder, tmp_path / "out")
        )
        assert before.keys() == after.keys()
        assert all(torch.equal(before[k], after[k]) for k in before)
    drawn = []
    for folder in (sana_folder, tmp_path / "out"):
        pipe = SanaPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
        pipe.set_progress_bar_config(disable=True)
        random = torch.Generator().manual_seed(0)
        options: PART = {"use_resolution_binning": False, "num_inference_steps": 3, "output_type": "np"}
        drawn.append(pipe("a red circle", height=32, width=64, generator=random, **options).images)
    assert drawn[0].std() > 0.05
    assert np.array_equal(*drawn)
    assert loading.load(tmp_path / "out").dit.spec == system.dit.spec


def test_export_of_a_component_is_what_came_in(tmp_path: Path):
    for changes in ({"qk_norm": "rms_norm_across_heads"}, {"guidance_embeds": True, "patch_size": 2}):
        model = tiny_peers.sana_transformer(**changes)
        folder = tiny_peers.saved(model, tmp_path / f"in{len(changes)}")
        assert export.export(loading.load(folder), tmp_path / f"out{len(changes)}") == []
        back = transformer(tmp_path / f"out{len(changes)}")
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in back.state_dict().items())
        ours = {k: v for k, v in back.config.items() if not k.startswith("_")}
        assert ours == {k: v for k, v in model.config.items() if not k.startswith("_")}


def test_our_own_models_leave_where_diffusers_has_their_like(tmp_path: Path):
    """Built here, not loaded: a Gemma from scratch, a DiT of our defaults, an autoencoder of one scale."""
    from diffusers import SanaPipeline

    tiny = {"widths": [8, 16, 16], "encoder_depths": [1, 1, 1], "decoder_depths": [1, 1, 1], "attention_stages": 1}
    spec: PART = {
        "name": "text2image",
        "dit": {"name": "sana", "dim": 32, "depth": 1, "cross_heads": 2, "base": 8},
        "autoencoder": {"name": "dcae", **tiny, "latent": 8, "head_dim": 8, "scale": 0.5},
        "text_encoder": {"name": "llm", "width": 16, "layers": 1, "heads": 1, "max_tokens": 20},
    }
    own = specs.build("system", spec).eval()
    notes = export.export(own, tmp_path / "out")
    assert any("max_sequence_length" in note for note in notes)
    assert any("t = 0.999, the lab at 1" in note for note in notes)
    pipe = SanaPipeline.from_pretrained(tmp_path / "out", low_cpu_mem_usage=False)
    assert same(*velocities(own.dit, pipe.transformer))
    tokens, mask, *_ = pipe.encode_prompt("a red circle", do_classifier_free_guidance=False, max_sequence_length=20)
    text = own.text_encoder(["a red circle"])
    assert same(text.tokens[text.mask], tokens[mask.bool()])
    own.autoencoder.shift[0] = 0.7
    with pytest.raises(SpecError, match=r"shifts its latents, by up to 0.7, .* train the autoencoder with system.norm"):
        export.export(own, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": "softmax"}, "this DiT has attention softmax and ffn mix of kernel 3"),
        ({"ffn": "mlp"}, "attention linear and ffn mlp of kernel none"),
        ({"cross_norm": True}, "or of neither; this DiT of one alone"),
    ],
)
def test_what_diffusers_has_not_is_not_exported(tmp_path: Path, change: PART, message: str):
    dit = specs.build(
        "dit", {"name": "sana", "dim": 32, "depth": 1, "cross_heads": 2, **change}, channels=4, text_dim=8
    )
    with pytest.raises(SpecError, match=message):
        export.export(dit, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_does_not_write_over_anything(tmp_path: Path, system: TextToImage):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SpecError, match="not empty"):
        export.export(system.dit, tmp_path)
    with pytest.raises(SpecError, match="a Linear cannot be exported"):
        export.export(nn.Linear(1, 1), tmp_path / "new")


# --- the verbs, and weights in an experiment


def run(*words: str | Path) -> None:
    assert __main__.main([str(word) for word in words]) == 0


def test_import_of_a_pipeline_draws_like_its_folder(sana_folder: Path, here: Path, capsys: pytest.CaptureFixture[str]):
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


def test_import_of_a_pth_is_weights_for_an_experiment(here: Path, capsys: pytest.CaptureFixture[str]):
    """What the verb prints is a spec that builds the model with its weights."""
    model = tiny_peers.sana_transformer()
    torch.save({"state_dict": nvlabs_state(model), **baggage({})}, here / "a.pth")
    run(
        "import",
        "a.pth",
        "--out",
        "dit.safetensors",
        "--set",
        "cross_heads=2",
        "attention.name=linear",
        "attention.head_dim=8",
    )
    printed = capsys.readouterr().out
    assert "taken: state_dict, the raw weights\n" in printed
    assert "left out: pos_embed, y_embedder.y_embedding, optimizer, scheduler, epoch, step, rng_state\n" in printed
    spec = OmegaConf.to_container(OmegaConf.create(printed.split("system\n")[1]))["dit"]
    assert set(spec) == {"name", "dim", "depth", "attention", "cross_heads", "weights"}
    assert same(*velocities(build("dit", spec, channels=8, text_dim=32), model))
    assert same(*velocities(loading.load("dit.safetensors"), model))
    assert weights.card(here / "dit.safetensors")["imported"] == "a.pth"


def test_weights_of_a_spec_may_be_a_released_model(tmp_path: Path, sana_folder: Path):
    model = tiny_peers.sana_pipeline()
    spec = loading.load(sana_folder, "dit").spec
    torch.save({"state_dict": nvlabs_state(model.transformer)}, tmp_path / "a.pth")
    for reference in (sana_folder, sana_folder / "transformer", tmp_path / "a.pth"):
        dit = build("dit", {**spec, "weights": str(reference)}, channels=8, text_dim=32)
        assert same(*velocities(dit.eval(), model.transformer))
    autoencoder = loading.load(sana_folder, "autoencoder").spec
    bare = {k: v for k, v in autoencoder.items() if k != "scale"}
    built = build("autoencoder", {**bare, "weights": str(sana_folder)})
    assert built.scale.tolist() == pytest.approx([0.41407] * 8)
    for kind, sound, change, supplied in (
        ("dit", spec, {"position": "sincos"}, {"channels": 8, "text_dim": 32}),
        ("autoencoder", autoencoder, {"head_dim": 16}, {}),
        ("autoencoder", autoencoder, {"last": "silu"}, {}),
    ):
        with pytest.raises(
            SpecError, match=f"has {next(iter(change))} .*and the spec says '?{next(iter(change.values()))}"
        ):
            build(kind, {**sound, **change, "weights": str(sana_folder)}, **supplied)
    with pytest.raises(SpecError, match="has cross_heads 2, and the spec says 4"):
        build("dit", {**spec, "cross_heads": 4, "weights": str(sana_folder)}, channels=8, text_dim=32)
    wide = {**spec["attention"], "head_dim": 16}
    with pytest.raises(SpecError, match="has heads of 8, the spec of 16"):
        build("dit", {**spec, "attention": wide, "weights": str(sana_folder)}, channels=8, text_dim=32)
    with pytest.raises(SpecError, match=r"x_embedder.proj.weight is \(32, 8, 1, 1\), expected \(32, 4, 1, 1\)"):
        build("dit", {**spec, "weights": str(tmp_path / "a.pth")}, channels=4, text_dim=32)


@pytest.mark.parametrize(
    ("make", "kind", "changes"),
    [
        (lambda: tiny_peers.sana_transformer(interpolation_scale=2.0), "dit", {"base": 4}),
        (lambda: tiny_peers.sana_transformer(interpolation_scale=2.0), "dit", {"interpolation": 1.0}),
        (lambda: tiny_peers.sana_transformer(qk_norm="rms_norm_across_heads"), "dit", {"cross_norm_eps": 1e-6}),
        (tiny_peers.kl_autoencoder, "autoencoder", {"groups": 8}),
    ],
)
def test_weights_are_not_read_otherwise_than_they_were_trained(
    tmp_path: Path, make: Callable[[], nn.Module], kind: str, changes: PART
):
    folder = tiny_peers.saved(make(), tmp_path / "a")
    spec = loading.load(folder).spec
    supplied = {"channels": 8, "text_dim": 32} if kind == "dit" else {}
    assert build(kind, {**spec, "weights": str(folder)}, **supplied) is not None
    with pytest.raises(SpecError, match=f"has {next(iter(changes))} .*, and the spec says"):
        build(kind, {**spec, **changes, "weights": str(folder)}, **supplied)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_pipeline_of_one_variant(tmp_path: Path, sharded: bool):
    """Every component of it in fp16 files; with others beside them it is chosen by name."""
    pipe = tiny_peers.sana_pipeline()
    options: PART = {"max_shard_size": "100KB"} if sharded else {}
    for part in (pipe.text_encoder, pipe.transformer, pipe.vae):
        part.half()
    folder = tiny_peers.saved(pipe, tmp_path / "p", variant="fp16", **options)
    assert list((folder / "text_encoder").glob("model*fp16*"))
    assert next(loading.load(folder).text_encoder.parameters()).dtype == torch.float16
    tiny_peers.saved(tiny_peers.gemma(), folder / "text_encoder")
    whole, half = (loading.load(folder, variant=v).text_encoder.state_dict() for v in (None, "fp16"))
    assert all(torch.equal(v.half().to(v), half[k]) for k, v in whole.items())
    assert not all(torch.equal(v, half[k]) for k, v in whole.items())
    run(
        "sample",
        "a red circle",
        "--model",
        folder,
        "--out",
        tmp_path / "out",
        "--variant",
        "fp16",
        "--set",
        "sampling.steps=1",
    )


def test_shards_by_their_index_or_by_one_of_them(tmp_path: Path):
    model = tiny_peers.sana_transformer()
    folder = tiny_peers.saved(model, tmp_path / "t", max_shard_size="100KB")
    shards = sorted(folder.glob("*.safetensors"))
    for path in (folder / "diffusion_pytorch_model.safetensors.index.json", shards[1]):
        assert loading.is_model(str(path))
        assert same(*velocities(loading.load(path), model))
    (folder / "diffusion_pytorch_model.safetensors.index.json").unlink()
    with pytest.raises(
        SpecError, match=r"is one of 3 shards, and their index diffusion_pytorch_model.safetensors.index"
    ):
        loading.load(shards[1])


def test_an_experiment_is_not_hidden_by_a_folder_of_its_name(here: Path, sana_folder: Path):
    (here / "photographs").mkdir()
    assert not loading.is_model("photographs")
    assert loading.is_model("./photographs")
    shutil.copy(sana_folder / "model_index.json", here / "photographs")
    assert loading.is_model("photographs")
    (here / "mine").mkdir()
    assert loading.is_model("mine")


def test_what_is_the_labs_is_not_imported(here: Path, sana_folder: Path):
    shipped = weights.find("experiment:shapes_dcae_f32")
    with pytest.raises(
        SpecError, match=r"is the lab's already, nothing to import: use it as it is, such as `weights: "
    ):
        imported.write_import(shipped, here / "out.safetensors")
    torch.save({"hyper_parameters": {}, "average": {}}, here / "a.ckpt")
    with pytest.raises(
        SpecError, match=r"a.ckpt is the lab's already, nothing to import: use it with `--model a.ckpt`"
    ):
        imported.write_import("a.ckpt", here / "out.safetensors")


def test_a_pipeline_loads_without_diffusers_and_takes_another_instruction(
    sana_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    system = loading.load(sana_folder)
    with pytest.raises(SpecError, match=r"for a pipeline: --set text_encoder.instruction=file:PATH"):
        system.text_encoder(["a red circle"])
    assert api.load(str(sana_folder), ["text_encoder.instruction=sana_lab"]).text_encoder(["a red circle"]).mask.any()


def test_export_says_what_is_sampled_otherwise(system: TextToImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The scheduler has the shift and order of the sampling; what it cannot have is said."""
    default = system.experiment["sampling"]
    told: dict[str, tuple[PART, str]] = {
        "euler": ({"solver": "euler", "grid": "even", "shift": 5.0}, "grid of its own"),
        "interval": ({"guidance_interval": [0.2, 0.8]}, "guided from t 0.2 to 0.8 alone"),
        "unipc": ({"solver": {"name": "unipc", "order": 3}}, "samples with unipc, this folder with Flow-DPM-Solver"),
    }
    for name, (change, said) in told.items():
        monkeypatch.setitem(system.experiment, "sampling", {**default, **change})
        monkeypatch.setitem(system.experiment, "data", {"size": 48})
        notes = export.export(system, tmp_path / name)
        assert [said in note for note in notes].count(True) == 1, notes
        scheduler = json.loads((tmp_path / name / "scheduler/scheduler_config.json").read_text())
        assert scheduler.get("shift", scheduler.get("flow_shift")) == change.get("shift", 3.0)
        assert scheduler.get("solver_order", 2) == 2
        assert json.loads((tmp_path / name / "transformer/config.json").read_text())["sample_size"] == 12
        assert "height=48, width=48" in (tmp_path / name / "README.md").read_text()
    monkeypatch.setattr(system.text_encoder, "null", "nvlabs")
    monkeypatch.setattr(system, "flow", Flow(2.0, 1.0))
    said = "\n".join(export.export(system, tmp_path / "own"))
    assert all(words in said for words in ("(nvlabs)", "the lab at 1.", "rounded down to 1/1000, the lab exact"))


def test_export_verb(sana_folder: Path, here: Path, capsys: pytest.CaptureFixture[str]):
    run("import", sana_folder, "--out", "sana.safetensors")
    run("export", "sana.safetensors", "out")
    assert "note: Prompts were read with an instruction" in capsys.readouterr().out
    assert loading.load("out").experiment["sampling"] == loading.load(sana_folder).experiment["sampling"]
    run("export", "shapes_dcae_f32", "own")
    assert loading.load("own").spec["scale"] == 1.0


def test_our_own_files(here: Path):
    """Shipped weights by their file, and a part of them; one whose experiment has changed says so."""
    shipped = weights.find("experiment:shapes_vae_f8")
    system = loading.load(shipped)
    assert type(system).__name__ == "AutoencoderSystem"
    assert loading.load(shipped, "autoencoder").channels == system.autoencoder.channels
    with pytest.raises(SpecError, match="holds a AutoencoderSystem, which has no dit"):
        loading.load(shipped, "dit")
    state, card = weights.read(shipped), weights.card(shipped)
    weights.write(here / "old.safetensors", state, {**card, "hash": "0" * 16})
    with pytest.raises(SpecError, match="was trained as experiment 'shapes_vae_f8' with other settings"):
        loading.load("old.safetensors")


# --- bad input


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("FluxPipeline", "is a FluxPipeline, another architecture; the lab reads SanaPipeline"),
        ("StableDiffusion3Pipeline", "is a StableDiffusion3Pipeline, another architecture"),
        ("PixArtSigmaPipeline", "is a PixArtSigmaPipeline, another architecture"),
        ("SanaSprintPipeline", "whose sampler the lab has not; load its DiT: kind='dit'"),
        ("SanaPAGPipeline", "with perturbed-attention guidance, and the lab has none; load its DiT: kind='dit'"),
    ],
)
def test_pipelines_of_another_architecture(tmp_path: Path, name: str, message: str):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(SpecError, match=message):
        loading.load(tmp_path)


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "SD3Transformer2DModel", "PixArtTransformer2DModel", None])
def test_components_of_another_architecture(tmp_path: Path, name: str | None):
    config = {"_class_name": name} if name else {"model_type": "gemma2"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = f"holds {name}" if name else "holds a gemma2 model of transformers, which is text_encoder"
    with pytest.raises(SpecError, match=f"{said}.*the lab reads SanaTransformer2DModel, AutoencoderDC, AutoencoderKL"):
        loading.load(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["double_blocks.0.img_attn.qkv.weight"], "holds FLUX, which is another architecture"),
        (["joint_blocks.0.x_block.attn.qkv.weight"], "holds Stable Diffusion 3"),
        (
            ["x_embedder.proj.weight", "y_embedder.y_proj.fc1.weight", "blocks.0.mlp.fc1.weight"],
            "holds a PixArt or plain DiT",
        ),
        (["caption_norm.weight", "transformer_blocks.0.attn1.to_q.weight"], "of diffusers without its config.json"),
        (["a", "b"], "is no DiT of NVlabs' Sana: x_embedder.proj.weight, .* missing; it begins a, b"),
    ],
)
def test_state_dicts_of_another_architecture(tmp_path: Path, names: list[str], message: str):
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "other.safetensors")
    with pytest.raises(SpecError, match=message):
        loading.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, "SanaTransformer2DModel has attention_bias True; the lab's has False alone"),
        ({"qk_norm": "layer_norm"}, "has qk_norm 'layer_norm'; expected rms_norm_across_heads"),
        ({"out_channels": 16}, "turns 8 channels into 16"),
        ({"cross_attention_dim": 64}, "has cross_attention_dim 64; the lab's has 32 alone"),
    ],
)
def test_a_configuration_that_is_not_ours(tmp_path: Path, change: PART, message: str):
    (tmp_path / "config.json").write_text(
        json.dumps({"_class_name": "SanaTransformer2DModel", **tiny_peers.DIT, **change})
    )
    with pytest.raises(SpecError, match=message):
        loading.load(tmp_path)


def test_every_odd_key_is_named_with_its_neighbour(tmp_path: Path):
    state = nvlabs_state(tiny_peers.sana_transformer())
    state["blocks.1.attn.prj.weight"] = state.pop("blocks.1.attn.proj.weight")
    state["t_block.1.bias"] = state["t_block.1.bias"][:5]
    state["extra.weight"] = torch.zeros(1)
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    with pytest.raises(SpecError) as error:
        loading.load(tmp_path / "a.pth", **HEADS)
    for said in (
        "blocks.1.attn.proj.weight is missing (did you mean 'blocks.1.attn.prj.weight'?)",
        "blocks.1.attn.prj.weight is not expected (did you mean 'blocks.1.attn.proj.weight'?)",
        "extra.weight is not expected",
        "t_block.1.bias is (5,), expected (192,)",
    ):
        assert said in str(error.value)
    torch.save(
        {
            "state_dict": {k: v for k, v in state.items() if "blocks.0.cross" not in k and "blocks.1" not in k}
            | {"blocks.1.x": torch.zeros(1)}
        },
        tmp_path / "b.pth",
    )
    with pytest.raises(SpecError, match=r"and \d+ more"):
        loading.load(tmp_path / "b.pth", **HEADS)


class Code:
    """What a hostile pickle holds."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.proof}",)


@pytest.mark.parametrize("ending", ["pth", "ckpt", "bin"])
def test_a_pickle_with_code_in_it_is_not_run(tmp_path: Path, ending: str):
    path = tmp_path / f"a.{ending}"
    torch.save({"state_dict": {"x_embedder.proj.weight": Code(tmp_path / "proof")}}, path)
    with pytest.raises(
        SpecError, match=r"is refused: a pickle that holds more.*can run any code \(it names posix.system\)"
    ):
        loading.load(path)
    path.write_bytes(pickle.dumps(Code(tmp_path / "proof"), 2))
    with pytest.raises(SpecError, match="can run any code"):
        loading.load(path)
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "a.ckpt"])
@pytest.mark.parametrize("left", [0, 7, 1000, -100])
def test_a_truncated_file(tmp_path: Path, name: str, left: int):
    state, path = nvlabs_state(tiny_peers.sana_transformer()), tmp_path / name
    save_file(state, path) if name.endswith("safetensors") else torch.save({"state_dict": state}, path)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(SpecError, match=f"{name} is cut short or is no"):
        loading.load(path, **HEADS)


def test_shards_that_are_lost_or_cut_short(tmp_path: Path):
    folder = tiny_peers.saved(tiny_peers.sana_transformer(), tmp_path / "t", max_shard_size="100KB")
    last = sorted(folder.glob("*.safetensors"))[-1]
    whole = last.read_bytes()
    last.write_bytes(whole[:-10])
    with pytest.raises(SpecError, match=f"{last.name} is cut short"):
        loading.load(folder)
    last.unlink()
    with pytest.raises(
        SpecError, match=f"lacks {last.name}, which diffusion_pytorch_model.safetensors.index.json names"
    ):
        loading.load(folder)


@pytest.mark.parametrize(
    ("lost", "message"),
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
def test_a_pipeline_that_lacks_something(tmp_path: Path, sana_folder: Path, lost: str, message: str):
    folder = shutil.copytree(sana_folder, tmp_path / "p")
    shutil.rmtree(folder / lost) if (folder / lost).is_dir() else (folder / lost).unlink()
    with pytest.raises(SpecError, match=message):
        loading.load(folder)


def test_parts_of_a_pipeline_that_do_not_fit_each_other(tmp_path: Path, sana_folder: Path):
    folder = shutil.copytree(sana_folder, tmp_path / "p")
    for changes, message in (
        ({"in_channels": 4, "out_channels": 4}, "the transformer takes latents of 4 channels, and the vae makes 8"),
        ({"caption_channels": 48}, "the transformer reads text 48 wide, and the text encoder makes it 32"),
    ):
        shutil.rmtree(folder / "transformer")
        tiny_peers.saved(tiny_peers.sana_transformer(**changes), folder / "transformer")
        with pytest.raises(SpecError, match=message):
            loading.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_flow_sigmas": False}, "the scheduler has use_flow_sigmas False; the lab's has True alone"),
        ({"algorithm_type": "sde-dpmsolver++"}, "algorithm_type 'sde-dpmsolver\\+\\+'"),
        ({"_class_name": "DDIMScheduler"}, "samples with DDIMScheduler"),
        *(
            ({f"use_{x}": True}, f"use_{x} True")
            for x in ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas")
        ),
        *(
            ({"_class_name": "FlowMatchEulerDiscreteScheduler", **x}, next(iter(x)))
            for x in (
                {"shift_terminal": 0.1},
                {"invert_sigmas": True},
                {"stochastic_sampling": True},
                {"use_karras_sigmas": True},
            )
        ),
    ],
)
def test_a_scheduler_that_the_lab_has_not(sana_folder: Path, change: PART, message: str):
    given = json.loads((sana_folder / "scheduler/scheduler_config.json").read_text())
    with pytest.raises(SpecError, match=message):
        schedulers.read_scheduler({**given, **change}, sana_folder)


def test_a_file_may_not_name_code(tmp_path: Path, sana_folder: Path):
    card = imported.write_import(sana_folder, tmp_path / "a.safetensors", "dit")
    card["parts"]["dit"]["spec"]["attention"] = {"name": "os:system"}
    weights.write(tmp_path / "b.safetensors", load_file(tmp_path / "a.safetensors"), card)
    with pytest.raises(SpecError, match="asks for 'os:system', code from outside the lab, which a file may not"):
        loading.load(tmp_path / "b.safetensors")


def test_paths_and_names_that_mean_nothing(tmp_path: Path):
    (tmp_path / "model.pth").touch()
    with pytest.raises(SpecError, match=r"there is no file or folder .*modle.pth'; did you mean 'model.pth'"):
        loading.load(tmp_path / "modle.pth")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        SpecError, match=r"holds nothing; expected model_index.json, config.json, or one .pth of NVlabs"
    ):
        loading.load(tmp_path / "empty")


def test_a_hub_id_without_a_network_says_what_is_needed_and_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
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


# --- memory

MEASURE = """
import json, sys, time
from pathlib import Path

import torch

from sana_lab import pretrained
from sana_lab.config import specs


def memory(key):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


with torch.device("meta"):
    specs.build("dit", {"name": "sana", "depth": 1}, channels=32, text_dim=8)  # every import is done
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
began = time.perf_counter()
dit = pretrained.load(sys.argv[1])
seconds = time.perf_counter() - began
for p in dit.parameters():
    p.detach().flatten().view(torch.uint8)[::4096].sum()  # every page of every weight is here
size = sum(p.numel() * p.element_size() for p in dit.parameters())
print(json.dumps({"size": size, "extra": memory("VmHWM") - before, "seconds": seconds, "dtype": str(p.dtype)}))
"""


def measured(path: Path) -> PART:
    done = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def wide_files(folder: Path, depth: int) -> list[Path]:
    """A fp16 DiT as wide as SANA-1.6B: NVlabs' .pth with both states and baggage, and diffusers' folders."""
    with torch.device("meta"):
        dit = specs.build(
            "dit", {"name": "sana", "dim": 2240, "depth": depth, "cross_heads": 20}, channels=32, text_dim=2304
        )
    state = {k: torch.ones(v.shape, dtype=torch.float16) for k, v in dit.state_dict().items()}
    theirs = rename_keys.to_theirs(state, key_tables.sana_nvlabs(dit.spec))
    states = {"state_dict": theirs, "state_dict_ema": {k: v.clone() for k, v in theirs.items()}}
    torch.save({**states, **baggage({"a": torch.zeros(10_000_000)})}, folder / "a.pth")
    dit.load_state_dict(state, assign=True)
    export.export(dit, folder / "one")
    shutil.copytree(folder / "one", folder / "shards")
    whole = folder / "shards/diffusion_pytorch_model.safetensors"
    huggingface_hub.save_torch_state_dict(
        load_file(whole), folder / "shards", filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
        max_shard_size="200MB",
    )  # fmt: skip
    return [folder / name for name in ("a.pth", "one", "shards")]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's account of memory")
def test_loading_takes_little_more_memory_than_the_weights(tmp_path: Path):
    """As wide as SANA-1.6B, with one block: the peak of resident memory, every weight read, is <= 1.3 x their size."""
    for path in wide_files(tmp_path, 1):
        found = measured(path)
        assert found["dtype"] == "torch.float16"
        assert found["size"] > 200e6
        assert found["extra"] <= 1.3 * found["size"], (path.name, found)
