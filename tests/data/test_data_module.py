"""The interface of a data set: what a guest's needs, what it inherits, and what is said of one that lacks something."""

import itertools
import pickle
from collections.abc import Sequence

import pytest
import torch

from sana_lab.config import specs
from sana_lab.config.specs import SpecError
from sana_lab.data import DataModule, Split, Turn
from sana_lab.types import Batch


class Guest(DataModule):
    """Five grey images, one held out, whose captions tell index and turn."""

    def __init__(self, size: int = 4, batch: int = 2, seed: int = 0, workers: int = 0) -> None:
        super().__init__(batch, seed, workers)
        self.size = size
        self.check_least(size=1)

    len_train, len_val = 4, 1

    def digest(self) -> str:
        return "grey"

    def batch_of(self, turns: Sequence[Turn], split: Split) -> Batch:
        images = torch.tensor([i / 4 for i, _ in turns])[:, None, None, None].expand(-1, 3, self.size, self.size)
        return Batch(images, [f"{split} {i} {draw}" for i, draw in turns])


class NoDigest(DataModule):
    len_train, len_val = 4, 0

    def batch_of(self, turns: Sequence[Turn], split: Split) -> Batch:
        raise AssertionError


def test_a_guest_offers_streams_and_captions():
    data: DataModule = specs.build("data", {"name": f"{__name__}:Guest", "seed": 1})
    prompts = [p for b in itertools.islice(data.train_dataloader(), 4) for p in b.prompts]
    assert sorted(prompts) == sorted(f"train {i} {epoch}" for i in range(4) for epoch in range(2))
    assert [b.prompts for b in data.val_dataloader()] == [["val 0 0"]]
    assert data.prompts_at([2, 0], draw=3) == ["train 2 3", "train 0 3"]
    assert pickle.loads(pickle.dumps(data)).train_batch(5).prompts == data.train_batch(5).prompts


def test_what_a_guest_lacks_is_named_while_its_spec_resolves():
    with pytest.raises(SpecError, match=r"lacks digest of sana_lab\.data\.DataModule"):
        specs.resolve("data", f"{__name__}:NoDigest")


@pytest.mark.parametrize(("option", "least"), [("size", 1), ("batch", 1), ("seed", 0), ("workers", 0)])
def test_options_below_their_least_value(option: str, least: int):
    with pytest.raises(ValueError, match=f"data 'guest': {option} is {least - 1}; it must be at least {least}"):
        Guest(**{option: least - 1})
