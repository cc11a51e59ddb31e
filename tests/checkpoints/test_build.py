"""Parts built with the weights that their specs name."""

from pathlib import Path

import tiny
import torch
from safetensors.torch import save_file

import sana_lab
from sana_lab.checkpoints.build import build
from sana_lab.config import specs

VAE = tiny.VAE_2X


def test_weights_are_loaded_and_only_where_the_spec_names_them(here: Path):
    assert sana_lab.build is build
    state = specs.build("autoencoder", VAE).state_dict()
    save_file(state, here / "vae.safetensors")
    spec = {**VAE, "weights": "vae.safetensors"}
    part = build("autoencoder", spec)
    assert part.spec["weights"] == "vae.safetensors"
    for other, same in ((part, True), (build("autoencoder", VAE), False), (specs.build("autoencoder", spec), False)):
        assert all(torch.equal(other.state_dict()[k], v) for k, v in state.items()) is same
    with torch.device("meta"):
        assert all(p.is_meta for p in build("autoencoder", {**spec, "weights": "nowhere.safetensors"}).parameters())
