"""Released weights named by a spec are those of a model that computes the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_peers
import torch
from tiny_peers import close, nvlabs_state, velocities
from torch import nn

from sana_lab.checkpoints.build import build
from sana_lab.config.validation import SpecError
from sana_lab.pretrained import loading


def test_weights_of_a_spec_may_be_a_released_model(tmp_path: Path, sana_folder: Path):
    model = tiny_peers.sana_pipeline()
    spec = loading.load(sana_folder, "dit").spec
    torch.save({"state_dict": nvlabs_state(model.transformer)}, tmp_path / "a.pth")
    for reference in (sana_folder, sana_folder / "transformer", tmp_path / "a.pth"):
        dit = build("dit", {**spec, "weights": str(reference)}, channels=8, text_dim=32)
        assert close(*velocities(dit.eval(), model.transformer))
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
    tmp_path: Path, make: Callable[[], nn.Module], kind: str, changes: dict[str, Any]
):
    folder = tiny_peers.saved(make(), tmp_path / "a")
    spec = loading.load(folder).spec
    supplied = {"channels": 8, "text_dim": 32} if kind == "dit" else {}
    assert build(kind, {**spec, "weights": str(folder)}, **supplied) is not None
    with pytest.raises(SpecError, match=f"has {next(iter(changes))} .*, and the spec says"):
        build(kind, {**spec, **changes, "weights": str(folder)}, **supplied)
