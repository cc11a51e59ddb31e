"""Checkpoints as people save them: nested, wrapped, averaged; the right weights come out of each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_peers
import torch
from safetensors.torch import save_file
from tiny_peers import NVLABS_HINTS, close, nvlabs_state, velocities
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from sana_lab.checkpoints import state_dicts, weights
from sana_lab.checkpoints.build import build
from sana_lab.config import specs
from sana_lab.config.validation import SpecError
from sana_lab.pretrained import loading, restore
from sana_lab.systems import System

State = dict[str, Tensor]


def under(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def within(word: str, state: State) -> State:
    """The names with a wrapper inside: `blocks.0._orig_mod.mlp ...`."""
    return {name.replace("blocks.0.", f"blocks.0.{word}."): tensor for name, tensor in state.items()}


RAW: dict[str, Callable[[State], Any]] = {
    "plain": lambda s: s,
    "model": lambda s: {"model": s, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
    "state_dict": lambda s: {"state_dict": s},
    "nested": lambda s: {"checkpoint": {"model": {"state_dict": s}}, "args": {"lr": 1e-4}},
    "beside numbers": lambda s: {**s, "epoch": 3, "lr": 0.1},
    "module.": lambda s: under("module.", s),
    "_orig_mod.": lambda s: under("_orig_mod.", s),
    "module._orig_mod.": lambda s: {"model": under("module._orig_mod.", s)},
    "_orig_mod.module.": lambda s: {"state_dict": under("_orig_mod.module.", s)},
    "fsdp": lambda s: within("_fsdp_wrapped_module", under("_fsdp_wrapped_module.", s)),
    "compiled blocks": lambda s: within("_orig_mod", s),
    "checkpointed blocks": lambda s: within("_checkpoint_wrapped_module", s),
    "lightning": lambda s: {"state_dict": under("model.", s), "pytorch-lightning_version": "2.5"},
    "lightning net": lambda s: {"state_dict": {**under("net._orig_mod.", s), "loss.weight": torch.ones(3)}},
    "any owner": lambda s: {"state_dict": under("diffusion.denoiser.model.", s)},
}


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt", ".bin", ".safetensors"])
@pytest.mark.parametrize("layout", RAW)
def test_raw_weights_in_every_layout(tmp_path: Path, layout: str, suffix: str):
    state = nvlabs_state(tiny_peers.sana_transformer())
    checkpoint, path = RAW[layout](state), tmp_path / f"a{suffix}"
    if suffix != ".safetensors":
        torch.save(checkpoint, path)
    elif all(isinstance(tensor, Tensor) for tensor in checkpoint.values()):
        save_file(checkpoint, path)
    else:
        pytest.skip("safetensors holds tensors alone")
    chosen = loading.formats.recognise(path, **NVLABS_HINTS).tensors
    assert set(chosen) >= set(state)
    assert all(torch.equal(chosen[name], state[name]) for name in state)


AVERAGED: dict[str, Callable[[State, State], Any]] = {
    "ema": lambda raw, ema: {"model": raw, "ema": ema},
    "ema_model": lambda raw, ema: {"model": raw, "ema_model": {"state_dict": ema}},
    "model_ema": lambda raw, ema: {"state_dict": raw, "model_ema": under("module.", ema)},
    "state_dict_ema": lambda raw, ema: {"state_dict": raw, "state_dict_ema": ema},
    "nested": lambda raw, ema: {"models": {"net": under("module.", raw), "net_ema": under("module.", ema)}},
    "shadow_params": lambda raw, ema: {"model": raw, "ema": {"decay": 0.9, "shadow_params": list(ema.values())}},
    "shadow": lambda raw, ema: {"model": raw, "ema": {"decay": 0.9, "shadow": ema}},
    "ema_pytorch": lambda raw, ema: {**under("online_model.", raw), **under("ema_model.", ema), "step": torch.ones(1)},
    "lightning": lambda raw, ema: {"state_dict": {**under("model.", raw), **under("ema_model.", ema)}},
    "latent-diffusion": lambda raw, ema: {
        "state_dict": {
            **under("model.diffusion_model.", raw),
            **{f"model_ema.diffusion_model{name}".replace(".", "").replace("model_ema", "model_ema.", 1): tensor
               for name, tensor in ema.items()},
            "model_ema.decay": torch.ones(()),
        }
    },
    "only": lambda raw, ema: {"ema": ema},
}  # fmt: skip


@pytest.mark.parametrize("layout", AVERAGED)
def test_the_average_is_taken_where_there_is_one(tmp_path: Path, layout: str):
    raw = nvlabs_state(tiny_peers.sana_transformer())
    ema = {name: tensor + (name != "pos_embed") for name, tensor in raw.items()}
    torch.save(AVERAGED[layout](raw, ema), tmp_path / "a.pth")
    chosen = loading.formats.recognise(tmp_path / "a.pth", **NVLABS_HINTS)
    assert all(torch.equal(chosen.tensors[name], ema[name]) for name in raw)
    assert "the averaged weights" in chosen.notes[0]
    if layout == "only":
        with pytest.raises(SpecError, match="only averaged weights"):
            loading.formats.recognise(tmp_path / "a.pth", ema=False, **NVLABS_HINTS)
        return
    chosen = loading.formats.recognise(tmp_path / "a.pth", ema=False, **NVLABS_HINTS)
    assert all(torch.equal(chosen.tensors[name], raw[name]) for name in raw)


def test_an_average_without_buffers_takes_them_from_the_raw_weights():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    raw = model.state_dict()
    ema = [p.detach() + 1 for p in model.parameters()]
    chosen = state_dicts.select({"model": raw, "ema": {"shadow_params": ema}}, list(raw), "a.pt")
    assert set(chosen) == set(raw)
    assert torch.equal(chosen["1.bias"], raw["1.bias"] + 1)
    assert torch.equal(chosen["1.running_var"], raw["1.running_var"])
    with pytest.raises(SpecError, match="in an order that is not that of the raw weights"):
        state_dicts.select({"model": raw, "ema": {"shadow_params": ema[::-1]}}, list(raw), "a.pt")


def test_torchs_averaged_model():
    average = AveragedModel(nn.Linear(2, 2))
    state = average.state_dict()
    assert set(state_dicts.select(state, ["weight", "bias"], "a.pt")) == {"weight", "bias"}


def test_two_models_are_not_guessed_from():
    state = {"student.weight": torch.ones(1), "teacher.weight": torch.zeros(1)}
    with pytest.raises(SpecError, match=r"several models, student, teacher; expected"):
        state_dicts.select(state, ["weight"], "a.pt")


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "dit.", "_orig_mod.", "model.dit._orig_mod.", "module.dit."])
def test_the_labs_own_names_in_every_layout(tmp_path: Path, prefix: str, suffix: str):
    spec = specs.resolve("dit", tiny.TWO_BLOCKS)
    model = tiny.dit()
    state, path = under(prefix, model.state_dict()), tmp_path / f"a{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state}, path)
    loaded = build("dit", {**spec, "weights": str(path)}, channels=tiny.CHANNELS, text_dim=tiny.TEXT_DIM)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model."])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_component_folder_of_diffusers(tmp_path: Path, prefix: str, suffix: str):
    model = tiny_peers.sana_transformer()
    model.save_pretrained(tmp_path)
    state, path = under(prefix, model.state_dict()), tmp_path / "diffusion_pytorch_model.safetensors"
    path.unlink()
    path = path.with_suffix(suffix)
    save_file(state, path) if suffix == ".safetensors" else torch.save({"model": state}, path)
    assert close(*velocities(loading.load(tmp_path), model))


def test_the_labs_checkpoint_of_a_compiled_model(tmp_path: Path):
    system: System = specs.build("system", {"name": "autoencoder", "autoencoder": tiny.VAE})
    checkpoint: dict[str, Any] = {"state_dict": dict(system.state_dict()), "hyper_parameters": dict(system.hparams)}
    system.on_save_checkpoint(checkpoint)
    wrapped = {name.replace("encoder.", "encoder._orig_mod.", 1): v for name, v in checkpoint["state_dict"].items()}
    torch.save({**checkpoint, "state_dict": wrapped}, tmp_path / "a.ckpt")
    loaded = restore.from_checkpoint(tmp_path / "a.ckpt").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in system.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", ["nvlabs", "own", "diffusers", "ckpt"])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, kind: str, value: float):
    if kind == "nvlabs":
        state = nvlabs_state(tiny_peers.sana_transformer())
        state["final_layer.linear.weight"][0, 0] = value
        torch.save(state, tmp_path / "a.pth")
        name, load = "head.linear.weight", lambda: loading.load(tmp_path / "a.pth", **NVLABS_HINTS)
    elif kind == "own":
        model = tiny.dit()
        name = list(model.state_dict())[1]
        model.state_dict()[name].flatten()[0] = value
        weights.write(tmp_path / "a.safetensors", model.state_dict(), {})
        spec = {**tiny.TWO_BLOCKS, "weights": str(tmp_path / "a.safetensors")}
        load = lambda: build("dit", spec, channels=tiny.CHANNELS, text_dim=tiny.TEXT_DIM)  # noqa: E731
    elif kind == "diffusers":
        model = tiny_peers.sana_transformer()
        model.proj_out.weight.data[0, 0] = value
        model.save_pretrained(tmp_path / "a")
        name, load = "head.linear.weight", lambda: loading.load(tmp_path / "a")
    else:
        system: System = specs.build("system", {"name": "autoencoder", "autoencoder": tiny.VAE})
        name = "autoencoder.encoder.stem.weight"
        system.state_dict()[name].flatten()[0] = value
        checkpoint: dict[str, Any] = {"state_dict": dict(system.state_dict()), "hyper_parameters": dict(system.hparams)}
        system.on_save_checkpoint(checkpoint)
        torch.save(checkpoint, tmp_path / "a.ckpt")
        load = lambda: restore.from_checkpoint(tmp_path / "a.ckpt")  # noqa: E731
    with pytest.raises(SpecError, match=rf"NaN or infinite weights, in .*{name}"):
        load()
