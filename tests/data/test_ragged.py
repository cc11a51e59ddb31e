"""Items of different lengths in shards: read by row, through few open files, in each stored type."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from sana_lab.data import disk_columns, ragged
from sana_lab.data.ragged import Encoded, Ragged

LENGTHS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]


def item(number: int, kind: torch.dtype) -> torch.Tensor:
    return (torch.arange(LENGTHS[number] * 2).view(-1, 2) + 100 * number).to(kind)


def encode(kind: torch.dtype):
    def encode(rows: range) -> Encoded:
        items = [item(row, kind) for row in rows]
        return Encoded(torch.cat(items), [len(i) for i in items], {})

    return encode


@pytest.fixture
def make(tmp_path):
    def make(kind: torch.dtype = torch.float32) -> Ragged:
        store = Ragged(tmp_path / str(kind), "text", 10, 3, {"made": "here"})
        store.fill(encode(kind))
        store.join()
        return store

    return make


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
def test_items_are_read_by_row_with_zeros_after_their_end(make, kind, monkeypatch):
    monkeypatch.setattr(ragged, "OPEN", 2)
    store, rows = make(kind), np.array([7, 0, 9, 3, 7, 5])
    out = store.read(rows, rows, multiple=4)
    assert out.shape == (6, 12, 2)
    assert out.dtype == kind
    for row, padded in zip(rows, out, strict=True):
        assert torch.equal(padded[: LENGTHS[row]], item(row, kind))
        assert not padded[LENGTHS[row] :].any()
    assert len(store._open) == 2


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts the open files in Linux's /proc")
def test_files_are_closed_when_others_are_opened(make, monkeypatch):
    monkeypatch.setattr(ragged, "OPEN", 1)
    store = make()
    store.read(np.array([0]), np.array([0]))  # maps the index
    before = len([*Path("/proc/self/fd").iterdir()])
    for row in (4, 9, 1, 6):
        store.read(np.array([row]), np.array([row]))
    assert len([*Path("/proc/self/fd").iterdir()]) == before
    del store
    assert len([*Path("/proc/self/fd").iterdir()]) < before


def test_reading_without_preadv_is_the_same(make, monkeypatch):
    store, rows = make(), np.arange(10)
    expected = store.read(rows, rows)
    monkeypatch.delattr(os, "preadv")
    assert torch.equal(store.read(rows, rows), expected)


def test_a_shard_that_shrinks_while_it_is_read(make):
    store = make()
    path = store.folder / "text-00002.safetensors"
    store.read(np.array([6]), np.array([6]))
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(ValueError, match=r"text-00002.safetensors is truncated; run `sana-lab cache` again"):
        store.read(np.array([8]), np.array([8]))


def test_another_process_opens_its_own_files(make):
    store, rows = make(), np.array([2, 8])
    expected = store.read(rows, rows)
    other = pickle.loads(pickle.dumps(store))
    assert other._open == {}
    assert torch.equal(other.read(rows, rows), expected)


def test_shards_of_other_facts_are_made_again(make, tmp_path):
    first = make()
    second = Ragged(first.folder, "text", 10, 3, {"made": "elsewhere"})
    assert {problem for _, problem in second.verify()} == {"was made of other data or by another encoder"}
    second.fill(encode(torch.float16))
    second.join()
    assert {problem for _, problem in second.verify()} == {None}
    assert second.table.meta["type"] == "float16"


def test_what_is_not_stored(tmp_path):
    """A shard of which nothing could be read, and numbers that overflowed; a single row may be unreadable."""
    faults = {f"{n}.png": "Input/output error" for n in range(3)}
    store = Ragged(tmp_path / "a", "latents", 3, 3, {})
    with pytest.raises(ValueError, match=r"none of 3 pictures in latents-00000.* can be read: 0.png \(Input/output"):
        store.fill(lambda rows: Encoded(torch.empty(0, 1), [0] * len(rows), faults))
    with pytest.raises(ValueError, match=r"latents are not finite in float16, in latents-00000"):
        store.fill(lambda rows: Encoded(torch.tensor([[1e6], [1.0], [2.0]]).half(), [1] * 3, {}))
    assert store.done() == 0
    one = Ragged(tmp_path / "b", "latents", 1, 3, {})
    one.fill(lambda rows: Encoded(torch.empty(0, 1), [0], {"0.png": "no image"}))
    assert one.done() == 1


def test_an_encoder_that_fails_is_no_folder_that_cannot_be_written(tmp_path):
    def fails(rows: range) -> Encoded:
        raise OSError("the model is missing")

    with pytest.raises(OSError, match=r"^the model is missing$"):
        Ragged(tmp_path / "a", "text", 3, 3, {}).fill(fails)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write to .*file/b.*; choose another place"):
        Ragged(tmp_path / "file" / "b", "text", 3, 3, {}).fill(fails)


def test_a_table_that_is_written_again_while_it_is_mapped(tmp_path):
    def write(values: range) -> None:
        with disk_columns.Writer(tmp_path, {"number": "i8"}) as writer:
            writer.extend("number", values)
            writer.finish({})

    write(range(5000))
    mapped = disk_columns.Table(tmp_path)["number"]
    write(range(3))
    assert mapped.tolist() == [*range(5000)]
    assert disk_columns.Table(tmp_path)["number"].tolist() == [0, 1, 2]
