"""Held-out items: by the manifest's split, by groups that are never divided, or by a hash of the name."""

import numpy as np
import pytest
from tiny_pictures import folder

from sana_lab.data.folder import Folder
from sana_lab.data.layouts import splits_of
from sana_lab.data.pictures import Pictures
from sana_lab.data.splits import CODES, held_out, shares

NAMES = [f"{i}.jpg" for i in range(400)]
GROUPS = [f"group {i // 4}" for i in range(400)]
NO_SPLIT = np.zeros(400, np.uint8)


@pytest.mark.parametrize("share", [0.1, 40, 41, 0.5])
def test_groups_are_never_divided(share):
    mask = held_out(shares(GROUPS), NO_SPLIT, share, NAMES.__getitem__)
    assert (mask.reshape(-1, 4).all(1) | ~mask.reshape(-1, 4).any(1)).all()
    assert abs(mask.mean() - (share if share < 1 else share / 400)) < 0.06


def test_a_group_follows_the_split_of_one_of_its_items():
    codes = NO_SPLIT.copy()
    codes[[0, 4]] = CODES["val"], CODES["train"]
    mask = held_out(shares(GROUPS), codes, 0.0, NAMES.__getitem__)
    assert np.flatnonzero(mask).tolist() == [0, 1, 2, 3]
    codes[1] = CODES["train"]
    with pytest.raises(ValueError, match=r"the group of '1.jpg' has items of train and of val"):
        held_out(shares(GROUPS), codes, 0.0, NAMES.__getitem__)


def test_new_items_change_no_split_of_others():
    few, many = (held_out(shares(NAMES[:n]), NO_SPLIT[:n], 0.2, NAMES.__getitem__) for n in (200, 400))
    assert (few == many[:200]).all()


def test_a_number_that_leaves_none():
    with pytest.raises(ValueError, match="held_out is 400 of 400 pictures; at most 399 leave one"):
        held_out(shares(NAMES), NO_SPLIT, 400, NAMES.__getitem__)


def test_a_share_of_all():
    with pytest.raises(ValueError, match=r"held_out is 50.0; expected a share below 1.0 or a number"):
        held_out(shares(NAMES), NO_SPLIT, 50.0, NAMES.__getitem__)
    for data in (Folder, Pictures):
        with pytest.raises(ValueError, match=r"data '\w+': held_out is 1.0; expected a share below 1.0"):
            data("pictures", held_out=1.0)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train-00000-of-00002.parquet", "test-00000-of-00001.parquet"], ["train", "val"]),
        (["train_000.parquet", "test_000.parquet"], ["train", "val"]),
        (["laion.train.0.parquet", "laion.val.0.parquet"], ["train", "val"]),
        (["train/000.tar", "held_out/000.tar"], ["train", "val"]),
        (["train00.tar", "validation00.tar"], ["train", "val"]),
        (["train/a.tar", "train/b.tar"], ["", ""]),
        (["latest.tar", "training.tar", "contest-0.tar"], ["", "train", ""]),
        (["."], [""]),
    ],
)
def test_splits_in_names_of_files(names, expected):
    assert splits_of(names) == expected


def test_a_folders_manifest_has_both_columns(tmp_path):
    root = folder(tmp_path / "pictures", range(12), group=lambda n: n // 3, split=lambda n: "test" if n == 4 else "")
    data = Folder(str(root), size=16, held_out=0)
    assert [entry.name for entry in data.index.val] == ["00003.png", "00004.png", "00005.png"]
    plain = folder(tmp_path / "plain", range(12))
    assert Folder(str(plain), size=16).digest() != data.digest()


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("split", "tset", r"captions.jsonl:1 has the split 'tset'; expected one of train"),
        ("clip_scores", [1.0], r"captions.jsonl:1 has 1 scores of 2 captions"),
        ("clip_scores", "high", r"captions.jsonl:1 has the scores 'high'; expected numbers"),
    ],
)
def test_a_malformed_column_names_file_and_line(tmp_path, column, value, message):
    root = folder(tmp_path, range(2), **{column: lambda n: value})
    with pytest.raises(ValueError, match=message):
        Folder(str(root), size=16).setup()
