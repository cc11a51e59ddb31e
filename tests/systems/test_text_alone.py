"""A text encoder that trains before a frozen DiT, by the objective and by distillation from the DiT's own encoder."""

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
from sana_lab.config import specs
from sana_lab.config.specs import SpecError
from sana_lab.diffusion.sampling import Sampling
from sana_lab.shapes.data import Shapes
from sana_lab.systems.text2image import TextToImage

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning 2.6 with torch >= 2.13
    pytest.mark.filterwarnings("ignore:.*in eval mode"),  # frozen parts are, on purpose
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Specs with weights: of a DiT and its text encoder, and of an adapter around another text encoder."""
    folder = tmp_path_factory.mktemp("weights")
    teacher, path = tiny.text2image(dit=tiny.TWO_BLOCKS), str(folder / "teacher.safetensors")
    with torch.no_grad():
        for name, p in teacher.dit.named_parameters():
            p.add_(0.1 * torch.randn(p.shape) * ("cross" in name or "head" in name))  # text reaches the output
    save_file(teacher.trained(), path)
    save_file(tiny.build("text_encoder", tiny.T5).state_dict(), folder / "t5.safetensors")
    inner = {**tiny.T5, "weights": str(folder / "t5.safetensors")}
    return {
        "dit": {**tiny.TWO_BLOCKS, "weights": path},
        "own": {**tiny.LLM, "weights": path},
        "adapter": {"name": "adapter", "encoder": inner, "width": 32, "layers": 1},
    }


def student(parts: dict[str, Any], text: str = "adapter", **options: Any) -> TextToImage:
    return tiny.text2image(dit=parts["dit"], text_encoder=parts[text], train_dit=False, **options)


def distill(parts: dict[str, Any], **options: Any) -> dict[str, Any]:
    return {"name": "distill", "teacher": parts["dit"], "text_encoder": parts["own"], **options}


def fit(module: TextToImage, steps: int, folder: Path | None = None, path: Path | None = None) -> list[float]:
    """The losses of a training on pictures of 16 pixels, with a checkpoint every two steps if there is a folder."""
    losses = tiny.Losses()
    keep = [ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)] if folder else []
    run: L.Trainer = tiny.trainer(
        steps, limit_val_batches=0, callbacks=[losses, *keep], enable_checkpointing=bool(keep)
    )
    data = Shapes(size=16, batch=8, held_out=8)
    run.fit(module, datamodule=data, ckpt_path=None if path is None else str(path), weights_only=True)
    return losses.values


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_the_dit_stays_and_the_adapter_trains_resumes_and_loads(parts, tmp_path: Path):
    whole, resumed = student(parts), student(parts)
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    fit(whole, 4, tmp_path)
    changed = {name for name, value in whole.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("text_encoder.") for name in changed)
    assert not any(name.startswith("text_encoder.encoder.") for name in changed)
    assert all(name.startswith("text_encoder.") for name in whole.average.values)
    fit(resumed, 4, tmp_path / "again", tmp_path / "step=2.ckpt")
    assert_same(resumed.state_dict(), whole.state_dict())
    checkpoint = torch.load(tmp_path / "step=4.ckpt", weights_only=True)["state_dict"]
    assert {name.split(".")[0] for name in checkpoint} == {"dit", "text_encoder"}
    assert not any(name.startswith("text_encoder.encoder.") for name in checkpoint)
    assert whole.trained().keys() == checkpoint.keys()
    loaded = api.load(str(tmp_path / "step=4.ckpt"))
    with whole.averaged():
        assert_same(loaded.text_encoder.state_dict(), whole.text_encoder.state_dict())
        assert_same(loaded.dit.state_dict(), whole.dit.state_dict())
    images = loaded.sample(["a red circle"], size=16, sampling=Sampling("euler", 1, 2.0))
    assert images.shape == (1, 3, 16, 16)


def test_distillation_alone_is_zero_where_the_text_encoder_is_the_teachers(parts):
    """Dropped captions included, and several draws; it trains, which needs the teacher's own encoder."""
    module = student(parts, "own", method=distill(parts, objective=0.0), text_dropout=0.5, draws=2)
    assert module.text_trains
    assert fit(module, 1) == [pytest.approx(0.0, abs=1e-9)]


def test_distillation_lowers_its_loss_in_a_few_steps(parts):
    optimizer = {"name": "adamw", "lr": 0.01}
    losses = fit(student(parts, method=distill(parts, objective=0.0), optimizer=optimizer, text_dropout=0.0), 24)
    assert sum(losses[-6:]) < 0.7 * sum(losses[:6])


def test_the_objective_is_weighted(parts):
    plain, half = (fit(student(parts, method=distill(parts, weight=0.0, objective=w)), 1)[0] for w in (1.0, 0.5))
    assert half == pytest.approx(plain / 2, rel=1e-5)
    assert fit(student(parts), 1) == [plain]


def test_the_dit_may_train_too(parts):
    module = tiny.text2image(dit=parts["dit"], text_encoder=parts["adapter"], method=distill(parts))
    before = module.dit.head.linear.weight.clone()
    fit(module, 2)
    assert not torch.equal(module.dit.head.linear.weight, before)


def test_what_does_not_fit(parts):
    with pytest.raises(SpecError, match="the text encoder does not train either"):
        student(parts, train_text=False)
    with pytest.raises(SpecError, match=r"system\.adapter trains in the DiT's place"):
        student(parts, adapter="lora")
    assert "train_dit" not in specs.canonical("system", {"name": "text2image"})
