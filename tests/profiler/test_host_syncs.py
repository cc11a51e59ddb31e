"""A training step waits for nothing: counted on the meta device, which has no values, and on a GPU by CUDA itself."""

from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import tiny
import torch
from torch import Tensor, nn

from sana_lab.profiler.host_syncs import SyncCounter, count_syncs
from sana_lab.systems.autoencoder import AutoencoderSystem
from sana_lab.systems.dit import DitSystem
from sana_lab.systems.text2image import TextToImage
from sana_lab.training.callbacks import ProgressBar, ProgressReporter
from sana_lab.training.divergence import DivergenceGuard
from sana_lab.types import Batch, Text

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*in eval mode"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]

DIT, VAE = tiny.DIT, tiny.VAE_2X
T5, LLM = tiny.T5, tiny.LLM
FUSED = {"name": "adamw", "fused": True}


def images() -> Batch:
    return Batch(torch.randn(4, 3, 8, 8), ["a red circle", "two", "three blue squares and a dog", ""])


def cached() -> Batch:
    text = Text(torch.randn(4, 5, 32), torch.arange(5) < torch.tensor([[2], [3], [4], [5]]))
    return Batch(None, [""] * 4, torch.randn(4, 4, 4, 4), text, Text(torch.randn(1, 1, 32), torch.ones(1, 1).bool()))


def system(text: dict[str, Any], **options: Any) -> TextToImage:
    return TextToImage(DIT, VAE, text, warmup=2, **options)


CASES: dict[str, tuple[Any, Any]] = {
    "dit": (lambda: DitSystem(DIT, VAE, T5, warmup=2), cached),
    "dit_fused": (lambda: DitSystem(DIT, VAE, T5, optimizer=FUSED, draws=2, model_time="released"), cached),
    "dit_ddpm": (lambda: DitSystem(DIT, VAE, T5, objective="ddpm"), cached),
    "t5": (lambda: system({**T5, "null": "nvlabs"}, text_dropout=0.5), images),
    "llm": (lambda: system(LLM), images),
    "llm_whole": (lambda: system(LLM), lambda: Batch(torch.randn(1, 3, 8, 8), ["a red circle"])),
    "llm_frozen": (lambda: system({**LLM, "null": "nvlabs", "instruction": "draw "}, train_text=False), images),
    "autoencoder": (lambda: AutoencoderSystem(VAE, schedule="constant", latent_noise=0.1), images),
}


@pytest.mark.parametrize("case", CASES)
def test_no_step_waits_between_logging_points(case: str, tmp_path: Path):
    """Noise, times, dropped captions, masks, loss, gradient clipping, optimiser, average, and what training calls."""
    make, batch = CASES[case]
    callbacks = [
        DivergenceGuard(tmp_path, every=1000),
        ProgressReporter(lambda *_: None, 1000),
        *([ProgressBar(1000)] if case == "dit" else []),
    ]
    found = count_syncs(make(), [batch()] * 3, callbacks=callbacks)
    assert found == [Counter()] * 2


# --- the counting itself


class Curious(L.LightningModule):
    """Asks for values in each way that there is."""

    def __init__(self, *ways: str) -> None:
        super().__init__()
        self.ways, self.layer = ways, nn.Linear(3, 1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        assert batch.latents is not None
        loss = self.layer(batch.latents).mean()
        for way in self.ways:
            getattr(self, way)(loss, batch.latents)
        return loss

    def item(self, loss: Tensor, x: Tensor) -> None:
        assert isinstance(loss.item(), float)

    def truth(self, loss: Tensor, x: Tensor) -> None:
        assert loss.isfinite()

    def list(self, loss: Tensor, x: Tensor) -> None:
        assert len(x.tolist()) == 2

    def copy(self, loss: Tensor, x: Tensor) -> None:
        assert x.cpu().shape == x.shape

    def sent(self, loss: Tensor, x: Tensor) -> None:
        assert torch.zeros(2).to(x).device == x.device

    def queued(self, loss: Tensor, x: Tensor) -> None:
        assert torch.zeros(2).to(x.device, non_blocking=True).device == x.device

    def masked(self, loss: Tensor, x: Tensor) -> None:
        with torch.fx.experimental._config.patch(meta_nonzero_assume_all_nonzero=True):
            assert x[x > 0].ndim == 1

    def told(self, loss: Tensor, x: Tensor) -> None:
        self.log("loss", loss.detach(), prog_bar=True, batch_size=2)


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("item", "_local_scalar_dense"),
        ("truth", "_local_scalar_dense"),
        ("list", "copy to the host"),
        ("copy", "copy to the host"),
        ("sent", "copy to the device"),
        ("masked", "index by a mask"),
        ("told", "_local_scalar_dense"),
    ],
)
def test_each_way_to_ask_is_counted_with_its_place(way: str, words: str):
    batch = Batch(None, [], torch.randn(2, 3))
    (found,) = count_syncs(Curious(way), [batch] * 2)
    assert found.total() >= 1
    assert all(why.startswith(words) for why in found)
    if way != "told":
        assert all("test_host_syncs.py:" in why for why in found)


def test_queued_copies_are_not_counted():
    assert count_syncs(Curious("queued"), [Batch(None, [], torch.randn(2, 3))] * 3) == [Counter()] * 2


def test_values_of_the_host_are_free():
    with SyncCounter() as mode:
        assert torch.ones(3).sum().item() == 3
        assert torch.ones(3).nonzero().shape == (3, 1)
    assert mode.total == 0


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", [case for case in CASES if case != "autoencoder"])
def test_cuda_sees_no_step_wait(case: str):
    """CUDA raises where the host would wait, from the second step on."""
    make, batch = CASES[case]
    module = make()

    class Watch(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            torch.cuda.set_sync_debug_mode("error")

        def on_train_end(self, *_: Any) -> None:
            torch.cuda.set_sync_debug_mode("default")

    options = {"gradient_clip_val": 1.0, "log_every_n_steps": 1000}
    run = tiny.trainer(4, accelerator="gpu", devices=1, callbacks=[Watch()], **options)
    loader = torch.utils.data.DataLoader([batch()] * 4, batch_size=None, collate_fn=lambda b: b, pin_memory=True)
    try:
        run.fit(module, loader)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run.global_step == 4
