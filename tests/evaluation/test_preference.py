"""Preference scores: the mean of any scorer, and the two measures on stand-ins for their packages."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from sana_lab.config.specs import SpecError
from sana_lab.evaluation.hps import Hps
from sana_lab.evaluation.image_reward import ImageReward
from sana_lab.evaluation.preference import PreferenceScores
from sana_lab.types import Json


class Brightness:
    """Scores a picture by its first pixel and reads at most three words."""

    def score(self, prompt: str, image: Tensor) -> float:
        return float(image[0, 0, 0]) - len(prompt.split())

    def is_truncated(self, prompt: str) -> bool:
        return len(prompt.split()) > 3

    def identity(self) -> Json:
        return {"scorer": "brightness"}


def pictures(*values: int) -> Tensor:
    return torch.stack([torch.full((3, 4, 4), value, dtype=torch.uint8) for value in values])


def rows(*prompts: str) -> list[Json]:
    return [{"prompt": prompt} for prompt in prompts]


def test_the_mean_with_its_interval_over_prompts() -> None:
    rewards = PreferenceScores("bright", Brightness())
    rewards.add(pictures(10, 20), rows("a b", "a b c d"))
    rewards.add(pictures(30), rows("a b"))
    report = rewards.report()
    assert report.per_image == {"bright": [8, 16, 28]}
    value = report.values["bright"]
    assert value.value == pytest.approx(52 / 3)
    assert value.n == 2
    assert value.low < value.value < value.high
    assert report.values["bright_truncated"].value == 50
    assert report.settings == {"scorer": "brightness", "images": 3, "prompts": 2, "truncated_percent": 50}


def test_a_score_that_is_no_number_is_told() -> None:
    scorer = Brightness()
    scorer.score = lambda prompt, image: float("nan")  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="the score of an image for 'a b' is nan"):
        PreferenceScores("bright", scorer).add(pictures(1), rows("a b"))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    config = tmp_path / "med_config.json"
    config.write_text("{}")
    torch.save({"state_dict": {"weight": torch.ones(2, 3)}}, tmp_path / "model.pt")
    return {"model": str(tmp_path / "model.pt"), "config": str(config)}


def test_image_reward_on_its_package(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    package: Any = ModuleType("ImageReward")
    asked = []

    def load(name: str, device: str, download_root: str | None = None, med_config: str | None = None) -> Any:
        asked.append((name, med_config))
        tokenizer = lambda text: {"input_ids": [0, *range(len(text.split())), 0]}  # noqa: E731
        score = lambda prompt, image: image.getpixel((0, 0))[0] / 100  # noqa: E731
        return SimpleNamespace(blip=SimpleNamespace(tokenizer=tokenizer), score=score)

    package.load = load
    monkeypatch.setitem(sys.modules, "ImageReward", package)
    measure = ImageReward(**files)
    measure.add(pictures(100, 50), rows("word " * 33, "word " * 34))
    report = measure.report()
    assert asked == [(files["model"], files["config"])]
    assert report.per_image["image_reward"] == [1.0, 0.5]
    assert report.values["image_reward_truncated"].value == 50
    assert report.settings["max_tokens"] == 35


class Towers(torch.nn.Module):
    """As an OpenCLIP model: features of length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2, 3))

    def encode_image(self, pixels: Tensor, normalize: bool) -> Tensor:
        return torch.nn.functional.normalize(pixels.mean((2, 3)) @ self.weight.T, dim=-1)

    def encode_text(self, ids: Tensor, normalize: bool) -> Tensor:
        return torch.nn.functional.normalize(ids.float(), dim=-1)


class Words:
    """As OpenCLIP's tokenizer, of two tokens: here the counts of words and letters."""

    context_length = 5

    def __call__(self, texts: list[str]) -> Tensor:
        return torch.tensor([[len(text.split()), len(text)] for text in texts])

    def encode(self, text: str) -> list[int]:
        return list(range(len(text.split())))


def prepare(image: Image.Image) -> Tensor:
    return torch.ones(3, 2, 2) * image.getpixel((0, 0))[0]


def test_hps_on_open_clip(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    package: Any = ModuleType("open_clip")
    package.create_model_and_transforms = lambda name: (Towers(), None, prepare)
    package.get_tokenizer = lambda name: Words()
    monkeypatch.setitem(sys.modules, "open_clip", package)
    measure = Hps(files["model"], "2.1")
    measure.add(pictures(100, 200), rows("a", "a b c d"))
    report = measure.report()
    cosines = [(n + m) / (2 * (n * n + m * m)) ** 0.5 for n, m in ((1, 1), (4, 7))]
    assert report.per_image["hps"] == pytest.approx([100 * c for c in cosines], abs=1e-4)
    assert report.values["hps_truncated"].value == 50
    assert report.settings["scorer"] == "HPS v2.1"


def test_a_package_that_is_not_there_is_named(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ImageReward", None)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match="needs the package image-reward: pip install image-reward"):
        ImageReward(**files)
    with pytest.raises(ImportError, match="needs the package open_clip_torch: pip install open_clip_torch"):
        Hps(files["model"], "2.0")


def test_files_that_are_not_there_are_named() -> None:
    with pytest.raises(SpecError, match=r"there is no file 'no.pt'; expected ImageReward.pt and med_config.json"):
        ImageReward("no.pt", "no.json")
    with pytest.raises(SpecError, match=r"there is no file 'no.pt'; expected HPS_v2_compressed.pt"):
        Hps("no.pt", "2.0")
