"""The DiT alone on cached features: the same training as the full system with frozen parts, resumed exactly."""

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import tiny
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from torch import Tensor

from sana_lab import api
from sana_lab.checkpoints import weights
from sana_lab.config import specs
from sana_lab.data.features import Features
from sana_lab.shapes.data import Shapes
from sana_lab.systems.dit import DitSystem, without
from sana_lab.systems.text2image import TextToImage
from sana_lab.types import Text

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.*LeafSpec.*:FutureWarning"
    ),  # Lightning 2.6 asks torch >= 2.13 what it deprecated
    pytest.mark.filterwarnings("ignore:.*in eval mode"),  # frozen parts are, on purpose
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


@pytest.fixture(scope="module")
def frozen(tmp_path_factory) -> dict[str, Any]:
    """An autoencoder and a text encoder with weights on disk, and a cache for what they encode."""
    folder = tmp_path_factory.mktemp("frozen")
    torch.manual_seed(1)
    made = {}
    for kind, spec in (("autoencoder", tiny.VAE), ("text_encoder", tiny.T5)):
        save_file(specs.build(kind, spec).state_dict(), folder / f"{kind}.safetensors")
        made[kind] = {**spec, "weights": str(folder / f"{kind}.safetensors")}
    return {**made, "folder": folder}


def data(frozen: dict[str, Any]) -> Features:
    latents = {"name": "latents", "source": {"name": "shapes", "size": 16, "held_out": 4}, "items": 10}
    latents |= {"autoencoder": frozen["autoencoder"], "cache": str(frozen["folder"] / "latents")}
    return Features(latents, frozen["text_encoder"], batch=4, cache=str(frozen["folder"] / "features"))


def denoiser(frozen: dict[str, Any], **options: Any) -> DitSystem:
    torch.manual_seed(0)
    given = {"dit": tiny.DIT, "warmup": 2, "ema": 0.9, "text_dropout": 0.3, **options}
    return DitSystem(autoencoder=frozen["autoencoder"], text_encoder=frozen["text_encoder"], **given)


def fit(
    system: L.LightningModule, source: L.LightningDataModule, folder: Path, path: Path | None = None
) -> tuple[Path, list[float]]:
    """Train 12 steps, keeping a checkpoint every six; the folder of checkpoints, and the losses."""
    keep, losses = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=6, save_top_k=-1), tiny.Losses()
    options = {"gradient_clip_val": 1.0, "val_check_interval": 6, "check_val_every_n_epoch": None}
    options |= {"enable_checkpointing": True}
    run = tiny.trainer(12, callbacks=[keep, losses], **options)
    run.fit(system, datamodule=source, ckpt_path=path, weights_only=True)
    assert "val/loss" in run.callback_metrics
    return folder, losses.values


@pytest.fixture(scope="module")
def trained(frozen, tmp_path_factory) -> tuple[DitSystem, Path, list[float]]:
    """A system after 12 steps, its checkpoints of steps 6 and 12, and its losses."""
    system = denoiser(frozen)
    return system, *fit(system, data(frozen), tmp_path_factory.mktemp("whole"))


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_resumed_training_equals_unbroken_training_to_the_last_bit(frozen, trained, tmp_path):
    whole, folder, losses = trained
    resumed = denoiser(frozen)
    _, later = fit(resumed, data(frozen), tmp_path, folder / "step=6.ckpt")
    assert later == losses[6:]
    assert_same(resumed.state_dict(), whole.state_dict())
    assert_same(resumed.average.values, whole.average.values)
    assert resumed.average.updates == 12


def test_trains_as_the_full_system_does_with_frozen_parts(frozen, trained, tmp_path):
    """The same losses, step by step, though one of them encodes pictures and captions as it goes."""
    full = TextToImage(
        tiny.DIT, frozen["autoencoder"], frozen["text_encoder"], train_text=False, warmup=2, text_dropout=0.3
    )
    full.dit.load_state_dict(denoiser(frozen).dit.state_dict())
    own = data(frozen)
    latents = specs.build("data", own.source | {"batch": 4})
    _, losses = fit(full, latents, tmp_path)
    assert losses == pytest.approx(trained[2], rel=1e-4)


def test_nothing_frozen_is_held(trained):
    assert {name.split(".")[0] for name in trained[0].state_dict()} == {"dit"}
    assert not any(p.is_meta for p in trained[0].parameters())


class TestCheckpoints:
    def test_loads_with_weights_only_and_gives_the_average(self, trained):
        system, folder, _ = trained
        checkpoint = torch.load(folder / "step=12.ckpt", weights_only=True)
        assert_same(checkpoint["state_dict"], system.state_dict())
        loaded = api.load(str(folder / "step=12.ckpt"))
        assert isinstance(loaded, DitSystem)
        assert_same({n: p.detach() for n, p in loaded.named_parameters()}, system.average.values)
        assert not loaded.training

    def test_one_of_another_shape_is_refused(self, frozen, trained, tmp_path):
        with pytest.raises(ValueError, match=r"fit DitSystem: dit\.blocks\.1\."):
            fit(denoiser(frozen, dit={**tiny.DIT, "depth": 2}), data(frozen), tmp_path, trained[1] / "step=12.ckpt")

    def test_a_full_system_takes_the_weights(self, frozen, trained, tmp_path):
        system, _, _ = trained
        weights.write(tmp_path / "dit.safetensors", system.trained(), {})
        spec = {**tiny.DIT, "weights": str(tmp_path / "dit.safetensors")}
        full = TextToImage(spec, frozen["autoencoder"], frozen["text_encoder"])
        assert_same({f"dit.{n}": p.detach() for n, p in full.dit.named_parameters()}, system.average.values)


class TestText:
    @pytest.mark.parametrize(("length", "null_length"), [(5, 2), (2, 5), (3, 3)])
    def test_dropped_rows_are_the_empty_prompt(self, length, null_length):
        random = torch.Generator().manual_seed(0)
        text = Text(torch.randn(3, length, 8, generator=random), torch.ones(3, length, dtype=torch.bool))
        null = Text(torch.randn(1, null_length, 8, generator=random), torch.ones(1, null_length, dtype=torch.bool))
        given = copy.deepcopy(text)
        out = without(text, torch.tensor([False, True, False]), null)
        for row, (tokens, mask) in enumerate(zip(*out, strict=True)):
            expected = null.tokens[0] if row == 1 else given.tokens[row]
            assert torch.equal(tokens[mask], expected)
            assert tokens.shape[0] == max(length, null_length)
        assert torch.equal(text.tokens, given.tokens)

    def test_a_batch_without_text_is_refused(self, frozen):
        batch = Shapes(size=16).batch_at([0])
        with pytest.raises(ValueError, match="expected data: features, or system: text2image"):
            denoiser(frozen).training_step(batch, 0)
        cached = data(frozen).batch_at([0])
        with pytest.raises(ValueError, match="expected data: features"):
            denoiser(frozen).training_step(cached._replace(text=None), 0)
