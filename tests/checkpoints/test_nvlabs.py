"""NVlabs' checkpoints: the state that is chosen, and the spec inferred from its tensors."""

from pathlib import Path

import pytest
import tiny_peers
import torch
from safetensors.torch import save_file
from tiny_peers import NVLABS_HINTS, close, nvlabs_state, nvlabs_training, velocities

from sana_lab.checkpoints import formats, key_tables, nvlabs, rename_keys
from sana_lab.checkpoints.build import build, build_on_meta
from sana_lab.config import specs
from sana_lab.config.validation import SpecError
from sana_lab.models.layers import sincos_positions
from sana_lab.pretrained import loading


@pytest.mark.parametrize("layout", ["state_dict", "raw", "module.", "old format", "safetensors"])
def test_layouts_of_a_checkpoint(tmp_path: Path, layout: str):
    model = tiny_peers.sana_transformer(interpolation_scale=None)
    state = nvlabs_state(model)
    path = tmp_path / "model.pth"
    if layout == "safetensors":
        path = tmp_path / "model.safetensors"
        save_file(state, path)
    elif layout == "raw":
        torch.save(state, path)
    elif layout == "module.":
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    else:
        torch.save(
            {"state_dict": state, **nvlabs_training(state)},
            path,
            _use_new_zipfile_serialization=layout != "old format",
        )
    dit = loading.load(path, **NVLABS_HINTS)
    assert close(*velocities(dit, model))
    assert dit.spec == specs.resolve("dit", dit.spec)
    assert (dit.spec["depth"], dit.spec["patch"], dit.spec["position"], dit.channels) == (2, 1, "none", 8)


def test_a_repository_of_nvlabs_holds_one_pth(tmp_path: Path):
    model = tiny_peers.sana_transformer()
    (tmp_path / "checkpoints").mkdir()
    torch.save({"state_dict": nvlabs_state(model)}, tmp_path / "checkpoints" / "Sana_tiny.pth")
    assert close(*velocities(loading.load(tmp_path, **NVLABS_HINTS), model))


def test_averaged_weights_are_taken_where_there_are_any(tmp_path: Path):
    averaged, raw = tiny_peers.sana_transformer(), tiny_peers.scattered(tiny_peers.sana_transformer(), 9)
    states = {"state_dict": nvlabs_state(raw), "state_dict_ema": nvlabs_state(averaged)}
    torch.save(states, tmp_path / "both.pth")
    torch.save({**states, "state_dict_ema": None}, tmp_path / "raw.pth")
    assert close(*velocities(loading.load(tmp_path / "both.pth", **NVLABS_HINTS), averaged))
    assert close(*velocities(loading.load(tmp_path / "both.pth", ema=False, **NVLABS_HINTS), raw))
    assert close(*velocities(loading.load(tmp_path / "raw.pth", **NVLABS_HINTS), raw))
    with pytest.raises(SpecError, match="holds no state_dict_ema"):
        loading.load(tmp_path / "raw.pth", ema=True, **NVLABS_HINTS)


@pytest.mark.parametrize(("interpolation", "base"), [(1.0, 8), (2.0, 16)])
def test_positions_are_inferred_from_the_buffer(tmp_path: Path, interpolation: float, base: int):
    model = tiny_peers.sana_transformer(interpolation_scale=interpolation, sample_size=base)
    state = nvlabs_state(model)
    table = sincos_positions(base, base, 32, base, interpolation, torch.device("cpu"))
    torch.save({"state_dict": state | {"pos_embed": table.reshape(1, -1, 32).half()}}, tmp_path / "4k.pth")
    dit = loading.load(tmp_path / "4k.pth", **NVLABS_HINTS)
    assert (dit.spec["base"], dit.spec["interpolation"]) == (base, interpolation)
    assert close(*velocities(dit, model))
    torch.save({"state_dict": state | {"pos_embed": torch.randn(1, 64, 32)}}, tmp_path / "odd.pth")
    with pytest.raises(SpecError, match="expected the options position, base and interpolation"):
        loading.load(tmp_path / "odd.pth", **NVLABS_HINTS)


def test_sprint_is_recognised_by_its_tensors(tmp_path: Path):
    model = tiny_peers.sana_transformer(guidance_embeds=True, qk_norm="rms_norm_across_heads")
    state = nvlabs_state(model)
    torch.save({"state_dict": state | {"logvar_linear.weight": torch.zeros(1, 32)}}, tmp_path / "sprint.pth")
    norm = {**NVLABS_HINTS["attention"], "qk_norm": True}
    dit = loading.load(tmp_path / "sprint.pth", **{**NVLABS_HINTS, "attention": norm})
    assert (dit.spec["guidance"], dit.spec["time_scale"], dit.spec["cross_norm"]) == (0.1, 1.0, True)
    assert dit.spec["cross_norm_eps"] == 1e-6
    assert dit.guidance_embed is not None
    with_norms = formats.recognise(tmp_path / "sprint.pth", cross_heads=2, attention={"head_dim": 8}).spec["attention"]
    assert with_norms == {"name": "linear", "head_dim": 8, "qk_norm": True}


@pytest.mark.parametrize(("width", "heads"), [(1152, 16), (2240, 20)])
def test_cross_attention_heads_follow_from_the_released_widths(width: int, heads: int):
    dit = build_on_meta("dit", {"name": "sana", "dim": width, "depth": 1}, channels=32, text_dim=2304)
    state = rename_keys.to_theirs(dit.state_dict(), key_tables.sana_nvlabs(dit.spec))
    spec, supplied = nvlabs.infer_spec(state, "a.pth", {})
    assert (spec["dim"], spec["cross_heads"], spec["attention"]["head_dim"]) == (width, heads, 32)
    assert supplied == {"channels": 32, "text_dim": 2304}


def test_heads_of_other_widths_are_asked_for(tmp_path: Path):
    torch.save({"state_dict": nvlabs_state(tiny_peers.sana_transformer())}, tmp_path / "a.pth")
    message = r"a.pth is 32 wide.*16 of width 1152, 20 of width 2240.*options cross_heads and attention.head_dim"
    for hints in ({}, {"cross_heads": 2}, {"attention": {"head_dim": 8}}, {"cross_heads": 2, "attention": {}}):
        with pytest.raises(SpecError, match=message):
            loading.load(tmp_path / "a.pth", **hints)


def test_time_scale_is_ambiguous_with_norms_alone(tmp_path: Path):
    """SANA-1.5 has norms of q and k and reads 1000 t, Sprint's teachers have them and read t."""
    state = nvlabs_state(tiny_peers.sana_transformer(qk_norm="rms_norm_across_heads"))
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    with pytest.raises(SpecError, match=r"norms q and k, .*time_scale, 1000 or 1"):
        loading.load(tmp_path / "a.pth", **NVLABS_HINTS)
    assert loading.load(tmp_path / "a.pth", **NVLABS_HINTS, time_scale=1.0).spec["time_scale"] == 1.0
    spec = specs.resolve("dit", {**formats.recognise(tmp_path / "a.pth", **NVLABS_HINTS, time_scale=1.0).spec})
    assert build("dit", {**spec, "weights": str(tmp_path / "a.pth")}, channels=8, text_dim=32) is not None
    wide = {"name": "sana", "dim": 2240, "depth": 1, "cross_heads": 20, "cross_norm": True}
    dit = build_on_meta("dit", {**wide, "attention": {"qk_norm": True}}, channels=32, text_dim=2304)
    state = rename_keys.to_theirs(dit.state_dict(), key_tables.sana_nvlabs(dit.spec))
    released = formats.nvlabs_weights(state, "a.pth")
    assert released.spec["time_scale"] == 1000.0
    assert [note.partition(",")[0] for note in released.notes] == ["time_scale: 1000 is taken"]


def test_hints_override_the_inferred_spec(tmp_path: Path):
    torch.save(
        {"state_dict": nvlabs_state(tiny_peers.sana_transformer(qk_norm="rms_norm_across_heads"))}, tmp_path / "a.pth"
    )
    spec = formats.recognise(tmp_path / "a.pth", cross_heads=2, attention={"head_dim": 8}, time_scale=1.0).spec
    assert spec["attention"] == {"name": "linear", "head_dim": 8, "qk_norm": True}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["double_blocks.0.img_attn.qkv.weight"], "FLUX, which is another architecture"),
        (["joint_blocks.0.x_block.attn.qkv.weight"], "holds Stable Diffusion 3"),
        (
            ["x_embedder.proj.weight", "y_embedder.y_proj.fc1.weight", "blocks.0.mlp.fc1.weight"],
            "holds a PixArt or plain DiT",
        ),
        (["caption_norm.weight", "transformer_blocks.0.attn1.to_q.weight"], "of diffusers without its config.json"),
        (["a", "b"], "x_embedder.proj.weight, .* missing; it begins a, b"),
    ],
)
def test_state_dicts_of_another_architecture(tmp_path: Path, names: list[str], message: str):
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "other.safetensors")
    with pytest.raises(SpecError, match=message):
        loading.load(tmp_path / "other.safetensors")
