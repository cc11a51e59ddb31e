"""`layout: classes`: folders as ImageNet's, numbers as torchvision's ImageFolder, and a class-conditional training."""

from pathlib import Path

import pytest
import tiny_pictures

from sana_lab import sample
from sana_lab.config import experiments
from sana_lab.config.specs import SpecError
from sana_lab.data.layouts.classes import Classes
from sana_lab.training import checks, train


def pictures(root: Path, names: list[str]) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(tiny_pictures.picture(number))
    return root


def rows(layout: Classes) -> list[tuple[str, str, str]]:
    return [(record.name, record.captions[0], record.split) for record in layout.records()]


def test_numbers_follow_the_names_of_classes(tmp_path: Path):
    root = pictures(tmp_path, ["n02/a.png", "n01/b.png", "n10/c.png", "n02/d.png"])
    (root / "n01" / "notes.txt").write_text("no picture")
    assert rows(Classes(root)) == [
        ("n01/b.png", "0", ""),
        ("n02/a.png", "1", ""),
        ("n02/d.png", "1", ""),
        ("n10/c.png", "2", ""),
    ]
    assert [caption for _, caption, _ in rows(Classes(root, label="name"))] == ["n01", "n02", "n02", "n10"]


def test_splits_lie_above_the_classes(tmp_path: Path):
    """A class may have the name of a split."""
    root = pictures(tmp_path, ["train/cat/a.png", "train/train/b.png", "val/cat/c.png", "val/train/d.png"])
    assert rows(Classes(root)) == [
        ("train/cat/a.png", "0", "train"),
        ("train/train/b.png", "1", "train"),
        ("val/cat/c.png", "0", "val"),
        ("val/train/d.png", "1", "val"),
    ]


def test_without_splits_a_class_called_train_is_a_class(tmp_path: Path):
    assert rows(Classes(pictures(tmp_path, ["train/a.png", "cat/b.png"]))) == [
        ("cat/b.png", "0", ""),
        ("train/a.png", "1", ""),
    ]


def test_a_picture_in_no_class(tmp_path: Path):
    with pytest.raises(SpecError, match="'classes' expects one per class"):
        rows(Classes(pictures(tmp_path, ["a.png", "cat/b.png"])))


def test_pictures_at_several_depths(tmp_path: Path):
    """ImageNet's val as it is unpacked."""
    root = pictures(tmp_path, ["train/cat/a.png", "train/dog/b.png", "val/c.png"])
    with pytest.raises(SpecError, match=r"val/c.png' is above the folders of classes"):
        rows(Classes(root))


YAML = """
system:
  name: text2image
  dit: {name: sana, dim: 32, depth: 1, patch: 2, cross_heads: 2, attention: softmax, ffn: mlp}
  autoencoder: {name: vae, widths: [8, 8, 8, 8], depth: 1, groups: 2}
  text_encoder: {name: label, classes: 2, width: 16}
data:
  name: pictures
  root: ROOT
  layout: classes
  size: 32
  batch: 2
  held_out: 2
trainer: {max_steps: 2, accelerator: cpu, validate_every: 2}
prompts: ["0", "1"]
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pictures(tmp_path / "pictures", [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(4)])
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "classes.yaml").write_text(YAML.replace("ROOT", "pictures"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_class_conditional_training(here: Path):
    train.train(experiments.load("classes"))
    images = sample("classes", ["0", "1", "1"], steps=1)
    assert images.shape == (3, 3, 32, 32)
    with pytest.raises(ValueError, match="'2' is no class"):
        sample("classes", ["2"], steps=1)


def test_a_prompt_that_is_no_class(here: Path):
    with pytest.raises(SpecError, match="prompts has 'a cat', which is none of the 2 that the text encoder reads"):
        checks.check(experiments.load("classes", ["prompts=[a cat]"]))
