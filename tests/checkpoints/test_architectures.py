"""Component folders of diffusers: loaded, compared, exported again; other classes and settings raise."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_peers
import torch
from safetensors.torch import load_file, save_file
from tiny_peers import close, velocities

from sana_lab.config.validation import SpecError
from sana_lab.pretrained import export, loading


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"patch_size": 2, "interpolation_scale": 2.0},
        {"qk_norm": "rms_norm_across_heads", "timestep_scale": 0.001},
    ],
)
def test_a_transformer_folder(tmp_path: Path, changes: dict[str, Any]):
    model = tiny_peers.sana_transformer(**changes)
    dit = loading.load(tiny_peers.saved(model, tmp_path / "t"))
    assert close(*velocities(dit, model))
    assert dit.spec["name"] == "sana"


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
def test_an_autoencoder_dc_round_trip(tmp_path: Path, changes: dict[str, Any]):
    model = tiny_peers.dc_autoencoder(**changes)
    ours = loading.load(tiny_peers.saved(model, tmp_path / "a"))
    images = torch.randn(2, 3, 16, 32, generator=torch.Generator().manual_seed(0))
    latents = model.encode(images).latent * 0.41407
    assert close(ours.encode(images), latents)
    assert close(ours.decode(latents), model.decode(latents / 0.41407).sample)
    assert export.export(ours, tmp_path / "b") == []
    back = type(model).from_pretrained(tmp_path / "b", low_cpu_mem_usage=False)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in back.state_dict().items())
    assert close(back.eval().decode(latents).sample, model.decode(latents).sample)


@pytest.mark.parametrize("changes", [{}, {"use_quant_conv": True, "use_post_quant_conv": True, "shift_factor": None}])
@torch.no_grad()
def test_an_autoencoder_kl_round_trip(tmp_path: Path, changes: dict[str, Any]):
    model = tiny_peers.kl_autoencoder(**changes)
    ours = loading.load(tiny_peers.saved(model, tmp_path / "a"))
    images = torch.randn(2, 3, 16, 32, generator=torch.Generator().manual_seed(0))
    shift = model.config.shift_factor or 0.0
    latents = (model.encode(images).latent_dist.mean - shift) * 1.5305
    assert close(ours.encode(images), latents)
    assert close(ours.decode(latents), model.decode(latents / 1.5305 + shift).sample)
    export.export(ours, tmp_path / "b")
    back = type(model).from_pretrained(tmp_path / "b", low_cpu_mem_usage=False)
    assert (back.config.shift_factor, back.config.scaling_factor) == (changes.get("shift_factor", 0.0609), 1.5305)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in back.state_dict().items())


def test_layer_names_of_the_first_kl_autoencoders(tmp_path: Path):
    model = tiny_peers.kl_autoencoder()
    folder = tiny_peers.saved(model, tmp_path / "a")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    for new, former in old.items():
        state = {k.replace(f"attentions.0.{new}.", f"attentions.0.{former}."): v for k, v in state.items()}
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    images = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        assert close(loading.load(folder).posterior(images)[0], model.encode(images).latent_dist.mean)


def test_a_transformer_round_trip(tmp_path: Path):
    for changes in ({"qk_norm": "rms_norm_across_heads"}, {"guidance_embeds": True, "patch_size": 2}):
        model = tiny_peers.sana_transformer(**changes)
        folder = tiny_peers.saved(model, tmp_path / f"in{len(changes)}")
        assert export.export(loading.load(folder), tmp_path / f"out{len(changes)}") == []
        back = type(model).from_pretrained(tmp_path / f"out{len(changes)}", low_cpu_mem_usage=False)
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in back.state_dict().items())
        ours = {k: v for k, v in back.config.items() if not k.startswith("_")}
        assert ours == {k: v for k, v in model.config.items() if not k.startswith("_")}


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "SD3Transformer2DModel", "PixArtTransformer2DModel", None])
def test_components_of_another_architecture(tmp_path: Path, name: str | None):
    config = {"_class_name": name} if name else {"model_type": "gemma2"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    other = f"holds {name}" if name else "gemma2 model of transformers, which is text_encoder"
    with pytest.raises(SpecError, match=f"{other}.*the lab reads SanaTransformer2DModel, AutoencoderDC, AutoencoderKL"):
        loading.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, "attention_bias True; only False"),
        ({"qk_norm": "layer_norm"}, "has qk_norm 'layer_norm'; expected rms_norm_across_heads"),
        ({"out_channels": 16}, "turns 8 channels into 16"),
        ({"cross_attention_dim": 64}, "cross_attention_dim 64; only 32"),
    ],
)
def test_settings_that_are_not_implemented(tmp_path: Path, change: dict[str, Any], message: str):
    (tmp_path / "config.json").write_text(
        json.dumps({"_class_name": "SanaTransformer2DModel", **tiny_peers.DIT, **change})
    )
    with pytest.raises(SpecError, match=message):
        loading.load(tmp_path)
