"""Class labels as text encoder: a vector per class, the null condition, names from a file, bad input."""

from pathlib import Path

import pytest
import torch

from sana_lab.config import specs
from sana_lab.config.specs import SpecError
from sana_lab.models.text.label import Label


def test_a_class_is_one_token_of_its_own():
    torch.manual_seed(0)
    text = Label(4, width=8)(["2", "0", "2", ""])
    assert text.tokens.shape == (4, 1, 8)
    assert text.mask.all()
    assert torch.equal(text.tokens[0], text.tokens[2])
    assert len({tuple(row[0].tolist()) for row in text.tokens}) == 3


def test_dropped_classes_get_the_null_vector():
    encoder = Label(["cat", "dog"], width=8)
    text = encoder.with_dropout(["cat", "dog"], [True, False])
    assert torch.equal(text.tokens[0], encoder([""]).tokens[0])
    assert torch.equal(text.tokens[1], encoder(["dog"]).tokens[0])


def test_gradients_reach_only_the_classes_of_the_batch():
    encoder = Label(3, width=4)
    encoder(["1", ""]).tokens.sum().backward()
    assert encoder.table.weight.grad.abs().sum(1).tolist() == [0, 4, 0, 4]


def test_names_of_a_file(tmp_path: Path):
    (tmp_path / "names.txt").write_text("tench\ngreat white shark\n\n")
    encoder = specs.build(
        "text_encoder", {"name": "label", "classes": None, "names": str(tmp_path / "names.txt"), "width": 4}
    )
    assert tuple(encoder.prompts) == ("tench", "great white shark")
    with pytest.raises(ValueError, match="'tenhc' is no class of text_encoder 'label'; did you mean 'tench'"):
        encoder(["tenhc"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ["cat", "cat"]}, "classes have 'cat' more than once"),
        ({"classes": []}, "expected a name for each"),
        ({"classes": ["cat", ""]}, "expected a name for each"),
        ({"classes": None}, "expected one of them"),
        ({"names": "names.txt"}, "expected one of them"),
        ({"classes": None, "names": "nowhere.txt"}, "names is 'nowhere.txt', which is no file"),
    ],
)
def test_bad_classes(options: dict[str, object], message: str):
    with pytest.raises(SpecError, match=message):
        Label(**options)
