"""`data: emoji`: drawings with captions, balanced by label; no held-out label or drawing is trained on."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny_emoji
import torch

from sana_lab.config import specs
from sana_lab.emoji import drawings
from sana_lab.emoji.data import Emoji
from sana_lab.emoji.drawings import Drawing

REAL = Path(__file__).parents[2] / "emoji"
"""Where `make emoji` expects the real archives."""


def labels(data: Emoji) -> tuple[set[Drawing], set[Drawing]]:
    """(trained on, held out)."""
    content = data.content
    return {content.rows[i] for i in content.train}, {content.rows[i] for i in content.val}


def unit(row: Drawing) -> tuple[str, tuple[int, ...]]:
    return row.concept, tuple(sorted(row.tones))


def check_split(data: Emoji) -> None:
    """No label, unit or drawing is on both sides, and both vendors' drawings of a label are on one."""
    train, val = labels(data)
    assert train
    assert val
    assert {row.label for row in train}.isdisjoint(row.label for row in val)
    key = (lambda row: row.concept) if data.by == "concepts" else unit
    assert set(map(key, train)).isdisjoint(map(key, val))
    held_out = {data.content.pixels[i].tobytes() for i in data.content.val}
    assert held_out.isdisjoint(data.content.pixels[i].tobytes() for i in data.content.train)
    captions = {caption for row in train for caption in drawings.captions(row)}
    assert captions.isdisjoint(caption for row in val for caption in drawings.captions(row))
    assert all(row.tones for row in val) or data.by == "concepts"


@pytest.mark.parametrize("by", ["combinations", "concepts"])
@pytest.mark.parametrize("held_out", [0.2, 0.5])
def test_nothing_held_out_is_trained_on(emoji: Path, by: str, held_out: float):
    check_split(Emoji(split=by, held_out=held_out))


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real archives in emoji/")
@pytest.mark.parametrize("by", ["combinations", "concepts"])
def test_nothing_held_out_of_the_real_archives_is_trained_on(by: str):
    data = Emoji(str(REAL), split=by)
    check_split(data)
    assert len(data.content.rows) + len(data.content.duplicates) == 2 * 3786
    people = sum(data.drawing(i).subgroup in range(15, 32) for i in range(data.len_train))
    assert 0.15 < people / data.len_train < 0.25


def test_gender_and_direction_make_no_other_concept():
    couple = "1F469-200D-2764-FE0F-200D-1F468"
    assert drawings.concept("1F468-200D-1F680") == drawings.concept("1F469-200D-1F680") == "1f9d1-200d-1f680"
    assert drawings.concept("1F6B6-200D-2640-FE0F-200D-27A1-FE0F") == drawings.concept("1F6B6") == "1f6b6"
    assert drawings.concept(couple) == drawings.concept("1F491") != drawings.concept("1F48F")
    assert drawings.concept("1F34E") != drawings.concept("1F34F")


def test_a_drawing_that_repeats_another_is_left_out(emoji: Path):
    data = Emoji(held_out=0.0)
    assert data.content.duplicates == {
        f"flag: Svalbard & Jan Mayen, {vendor}": "flag: Norway" for vendor in ("noto", "twemoji")
    }
    assert len(data.content.rows) == 2 * (len(tiny_emoji.THINGS) + 6 * len(tiny_emoji.PEOPLE))
    assert data.len_val == 0


def test_labels_come_equally_often(emoji: Path):
    data = Emoji(held_out=0.0, repeats=6)
    counts = Counter((data.drawing(i).base, data.drawing(i).vendor) for i in range(data.len_train))
    assert set(counts.values()) == {6}
    assert Emoji(held_out=0.0, repeats=1).len_train == len(data.content.rows)


def test_pictures_on_a_background(emoji: Path):
    data = Emoji(vendors="noto", held_out=0.0, repeats=1, size=64, background="grey")
    index = next(i for i in range(data.len_train) if data.drawing(i).label == "astronaut: dark skin tone")
    batch = data.batch_at([index])
    expected = np.asarray(tiny_emoji.picture("noto", "astronaut", 5))[..., :3].transpose(2, 0, 1)
    image = ((batch.images[0] + 1) * 127.5).round().byte()
    torch.testing.assert_close(image[:, 8:], torch.from_numpy(expected[:, 8:].copy()))
    assert (image[:, :8] == 128).all()
    assert Emoji(vendors="noto", size=32).batch_at([0]).images.shape == (1, 3, 32, 32)


def test_captions_name_label_style_and_tags(emoji: Path):
    data = Emoji(vendors="twemoji", held_out=0.0)
    index = next(i for i in range(data.len_train) if data.drawing(i).label == "waving hand: light skin tone")
    texts = {data.prompts_at([index], draw=draw)[0] for draw in range(6)}
    label = "waving hand: light skin tone"
    assert texts == {
        f"{label}, Twemoji",
        f"Twemoji emoji, {label}",
        f"{label}, tag, Twemoji",
        f"{label}, waving, Twemoji",
    }
    data = Emoji(held_out=0.5)
    row = data.drawing(0, "val")
    assert data.prompts_at([0], "val") == [f"{row.label}, {drawings.STYLES[row.vendor]}"]


def test_batches_are_those_of_a_spec(emoji: Path):
    data = specs.build("data", {"name": "emoji", "batch": 3, "held_out": 0.5})
    batches = list(itertools.islice(data.train_dataloader(), 2))
    assert [batch.images.shape for batch in batches] == [(3, 3, 64, 64)] * 2
    assert [batch.prompts for batch in batches] == [data.train_batch(i).prompts for i in range(2)]
    assert sum(len(batch.prompts) for batch in data.val_dataloader()) == data.len_val > 0
    with pytest.raises(IndexError, match="val drawings; given index"):
        data.batch_at([data.len_val], "val")


def test_the_digest_needs_no_archives(here: Path):
    assert Emoji("nowhere").digest() == Emoji("elsewhere").digest() != Emoji(vendors="noto").digest()
    with pytest.raises(ValueError, match="npm pack"):
        Emoji("nowhere").check_content()
    with pytest.raises(ValueError, match="npm pack"):
        Emoji("nowhere").setup()
