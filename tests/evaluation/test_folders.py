"""Distances of two folders of pictures: those of the measure on the same images, and errors in one line."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from sana_lab import __main__
from sana_lab.config.specs import SpecError, build
from sana_lab.evaluation.folders import distances

SPEC = {"name": "function", "function": "tiny_pixels:pixels", "dim": 12}


@pytest.fixture
def folders(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (here / "tiny_pixels.py").write_text("def pixels(images):\n    return images.float()[:, :, :2, :2].flatten(1)\n")
    for name, seed in (("a", 0), ("b", 1)):
        (here / name).mkdir()
        generator = torch.Generator().manual_seed(seed)
        for i, image in enumerate(torch.randint(0, 256, (20, 8, 8, 3), generator=generator, dtype=torch.uint8)):
            Image.fromarray(image.numpy()).save(here / name / f"{i:02d}.png")
    return here


def images(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (20, 8, 8, 3), generator=generator, dtype=torch.uint8).permute(0, 3, 1, 2)


def test_they_are_those_of_the_measure(folders: Path):
    measure = build("measure", {"name": "distances", "extractor": SPEC, "metrics": ["fid", "kid"]})
    measure.refer(images(1))
    measure.add(images(0), [{}] * 20)
    ours = distances("a", "b", extractor=SPEC, metrics=["fid", "kid"])
    theirs = measure.report().values
    assert ours.keys() == theirs.keys()
    assert [e.value for e in ours.values()] == pytest.approx([e.value for e in theirs.values()])
    assert {estimate.n for estimate in ours.values()} == {20}


def test_a_folder_against_itself_has_no_distance(folders: Path):
    (estimate,) = distances("a", "a", extractor=SPEC).values()
    assert estimate.value == pytest.approx(0, abs=1e-3)


def test_the_verb(folders: Path, capsys: pytest.CaptureFixture[str]):
    text = "{name: function, function: 'tiny_pixels:pixels', dim: 12}"
    assert __main__.main(["stats", "b", "--extractor", text, "--out", "b.safetensors"]) == 0
    capsys.readouterr()
    for real in ("b", "b.safetensors"):
        assert __main__.main(["fid", "a", real, "--extractor", text]) == 0
        line = capsys.readouterr().out
        assert line.startswith("fd_")
        assert "n 20" in line


def test_what_is_missing_is_named(folders: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SpecError, match="no folder 'c'"):
        distances("c", "b", extractor=SPEC)
    assert __main__.main(["fid", "a", "b"]) == 1
    assert "--weights FILE" in capsys.readouterr().err
