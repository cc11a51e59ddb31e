"""A user's own networks, data and systems that break a rule are refused before training, in one line."""

import time
from pathlib import Path

import pytest
import tiny
import torch

from sana_lab.config import experiments
from sana_lab.config.specs import SpecError
from sana_lab.contracts import preflight
from sana_lab.training import checks

PARTS = """
import torch
import torch.nn.functional as F
from typing import Annotated
from torch import nn
from sana_lab.config.specs import Spec
from sana_lab.data import DataModule
from sana_lab.models.autoencoders import Autoencoder
from sana_lab.models.dit import Dit
from sana_lab.models.text import TextEncoder
from sana_lab.systems import System
from sana_lab.systems.ema import Average
from sana_lab.types import Batch, Text


class Good(Dit):
    def __init__(self, width: int = 8, *, channels: int, text_dim: int) -> None:
        super().__init__()
        self.channels, self.text_dim, self.patch = channels, text_dim, 1
        self.net = nn.Sequential(nn.Conv2d(channels, width, 1), nn.Conv2d(width, channels, 1))
    def forward(self, x, t, text, guidance=None):
        return self.net(x)

class Crops(Good):
    def forward(self, x, t, text, guidance=None):
        return self.net(x)[..., :-1]

class Mismatch(Good):
    def forward(self, x, t, text, guidance=None):
        return self.net(x) + F.linear(text.tokens, torch.ones(5, self.text_dim + 1))

class NeedsCuda(Good):
    def forward(self, x, t, text, guidance=None):
        raise RuntimeError("this kernel needs a CUDA device")

class Pixels(Autoencoder):
    def __init__(self, block: int = 2) -> None:
        super().__init__(channels=3 * block**2, downsample=block)
    def posterior(self, images):
        mean = F.pixel_unshuffle(images, self.downsample)
        return mean, torch.full_like(mean, -30.0)
    def reconstruct(self, z):
        return F.pixel_shuffle(z, self.downsample)

class Alone(Pixels):
    def posterior(self, images):
        return super().posterior(images)[0]

class Narrow(Pixels):
    def posterior(self, images):
        return tuple(v[:, 1:] for v in super().posterior(images))

class Letters(TextEncoder):
    def __init__(self, dim: int = 8, max_tokens: int = 8) -> None:
        super().__init__()
        self.dim, self.max_tokens = dim, max_tokens
        self.bytes = nn.Embedding(257, dim)
    def forward(self, prompts):
        rows = [[*prompt.encode()[: self.max_tokens - 1], 256] for prompt in prompts]
        ids = torch.tensor([row + [0] * (self.max_tokens - len(row)) for row in rows])
        return Text(self.bytes(ids), torch.tensor([[i < len(row) for i in range(self.max_tokens)] for row in rows]))

class Bare(Letters):
    def forward(self, prompts):
        return super().forward(prompts).tokens

class Numbers(Letters):
    def forward(self, prompts):
        text = super().forward(prompts)
        return Text(text.tokens, text.mask.float())

class Stripes(DataModule):
    len_train, len_val = 10, 2
    def __init__(self, size: int = 16, batch: int = 2) -> None:
        super().__init__(batch, 0, 0)
        self.size = size
    def digest(self):
        return "stripes"
    def batch_of(self, turns, split):
        return Batch(torch.zeros(len(turns), 3, self.size, self.size), ["stripes"] * len(turns))

class Bytes(Stripes):
    def batch_of(self, turns, split):
        return super().batch_of(turns, split)._replace(images=torch.full((len(turns), 3, 16, 16), 255.0))

class Silent(Stripes):
    def batch_of(self, turns, split):
        return super().batch_of(turns, split)._replace(prompts=[])

class Prepared(Silent):
    def setup(self, stage):
        pass

class Colour(System):
    def __init__(self, width: int = 3, optimizer: Annotated[Spec, "optimizer"] = "adamw") -> None:
        super().__init__()
        self.head = nn.Linear(3, width)
        self.average = Average(self, 0.9)
    def training_step(self, batch, batch_idx):
        loss = self.head(batch.images.mean((2, 3))).square().mean()
        self.log("train/loss", loss.detach())
        return loss

class Wrong(Colour):
    def training_step(self, batch, batch_idx):
        return self.head(batch.images).square().mean()

class Forgets(Colour):
    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)

class Detached(Colour):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx).detach()

class Rows(Colour):
    def training_step(self, batch, batch_idx):
        return self.head(batch.images.mean((2, 3)))

class ByTrainer(Colour):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) / self.trainer.max_steps

class Reports(Colour):
    def evaluate(self, evaluator):
        def inner():
            return 3
        return evaluator.reported({})

class Prints(Colour):
    def evaluate(self, evaluator):
        def inner():
            return 3
        print(evaluator)

class Number(Colour):
    def evaluate(self, evaluator):
        return 0.5

class Deaf(Colour):
    def evaluate(self):
        return {}
"""

DIT, AUTOENCODER, TEXT, SYSTEM = "system.dit", "system.autoencoder", "system.text_encoder", "system"


@pytest.fixture
def folder(here: Path) -> Path:
    (here / "my_parts.py").write_text(PARTS)
    tiny.write_experiment(here, changes={"data.size": 16})
    text = "system: my_parts:Colour\ndata: {name: shapes, size: 16, batch: 2, held_out: 2}\ntrainer: {max_steps: 2}\n"
    (here / "experiments/own.yaml").write_text(text)
    return here


def refusal(place: str, part: str) -> str:
    """What an experiment with such a part is refused with; nothing where it is not."""
    name, spec = "own" if place == SYSTEM else "tiny", part if "{" in part else f"my_parts:{part}"
    try:
        checks.check(experiments.load(name, [f"{place}={spec}"]))
    except SpecError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("place", "part", "words"),
    [
        (DIT, "Crops", "velocity has the latents' shape: the velocity has shape (2, 4, 2, 1), expected (2, 4, 2, 2)"),
        (DIT, "Mismatch", "(my_parts.py, line 30: return self.net(x) + F.linear("),
        (AUTOENCODER, "Alone", "`posterior` returns no pair (mean, log-variance)"),
        (AUTOENCODER, "Narrow", "the mean has shape (2, 11, 8, 8), expected (2, 12, 8, 8)"),
        (TEXT, "Bare", "it returns a Tensor, expected sana_lab.types.Text(tokens, mask)"),
        (TEXT, "Numbers", "the mask is torch.float32, expected torch.bool"),
        ("data", "Bytes", "images lie in [255, 255], expected [-1, 1]"),
        ("data", "Silent", "3 items have 0 prompts"),
        (SYSTEM, "Wrong", "A training step returns a loss: RuntimeError: "),
        (SYSTEM, "Forgets", "`training_step` returns a NoneType, expected the loss"),
        (SYSTEM, "Detached", "the loss carries no gradient"),
        (SYSTEM, "Rows", "the loss has shape (2, 3), expected (1,)"),
        (SYSTEM, "Prints", "`evaluate` returns nothing, expected plain data in a dict"),
        (SYSTEM, "Number", "`evaluate` returns 0.5, expected plain data in a dict"),
        (SYSTEM, "Deaf", "too many positional arguments; expected evaluate(self, evaluator)"),
    ],
)
def test_a_broken_part_is_refused_before_training(folder: Path, place: str, part: str, words: str):
    start = time.monotonic()
    refused = refusal(place, part)
    assert words in refused
    assert f"'my_parts:{part}' breaks a rule of its kind" in refused
    assert "\n" not in refused
    assert time.monotonic() - start < 5  # a second or two, on a busy machine


@pytest.mark.parametrize(
    ("place", "part"),
    [
        (DIT, "Good"),
        (DIT, "NeedsCuda"),  # says nothing of a training elsewhere
        (AUTOENCODER, "Pixels"),
        (TEXT, "Letters"),
        ("data", "Stripes"),
        ("data", "Prepared"),  # has its items once Lightning has set it up
        (SYSTEM, "Colour"),
        (SYSTEM, "ByTrainer"),
        (SYSTEM, "Reports"),
    ],
)
def test_a_sound_part_is_not(folder: Path, place: str, part: str):
    assert refusal(place, part) == ""


@pytest.mark.parametrize(
    ("place", "part"), [(DIT, "Crops"), (DIT, "Mismatch"), (AUTOENCODER, "Narrow"), (SYSTEM, "Wrong")]
)
def test_large_ones_are_checked_by_their_shapes(folder: Path, monkeypatch: pytest.MonkeyPatch, place: str, part: str):
    """Without memory and without work."""
    preflight._check_network.cache_clear()
    preflight._check_system.cache_clear()
    monkeypatch.setattr(preflight, "MAX_WORK", 0)
    assert "breaks a rule of its kind" in refusal(place, part)
    assert refusal(DIT, '{name: "my_parts:Good", width: 100000000}') == ""
    assert refusal(TEXT, "Letters") == ""


def test_random_numbers_are_left_alone(folder: Path):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    assert refusal(DIT, '{name: "my_parts:Good", width: 9}') == ""
    assert torch.rand(1) == expected
