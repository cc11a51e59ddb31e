"""Parquet and Arrow files by row: any order, in bounded memory."""

import pickle
import random
from pathlib import Path

import pytest

from sana_lab.data import arrow

pyarrow = pytest.importorskip("pyarrow")


def rows_of(first: int, count: int) -> list[dict]:
    return [{"image": bytes([n]) * 1000, "caption": f"a picture {n}", "number": n} for n in range(first, first + count)]


@pytest.fixture
def paths(tmp_path) -> list[Path]:
    """A Parquet file of ten groups of ten rows, and an Arrow file of ten batches."""
    from pyarrow import parquet

    first, second = (pyarrow.Table.from_pylist(rows_of(n, 100)) for n in (0, 100))
    parquet.write_table(first, tmp_path / "a.parquet", row_group_size=10)
    with pyarrow.ipc.new_file(str(tmp_path / "b.arrow"), second.schema) as writer:
        writer.write_table(second, max_chunksize=10)
    return [tmp_path / "a.parquet", tmp_path / "b.arrow"]


def is_image(name: str) -> bool:
    return name == "image"


@pytest.mark.parametrize("size", [1, 2500, 2**25])
def test_rows_in_order_of_any_size(paths, monkeypatch, size):
    monkeypatch.setattr(arrow, "BATCH_BYTES", size)
    for first, path in zip((0, 100), paths, strict=True):
        table = arrow.Table(path)
        assert list(table.rows()) == rows_of(first, 100)
        assert table.columns == {"image": True, "caption": False, "number": False}
        assert len(table) == 100
        assert [table.place(n) for n in (0, 9, 10, 99)] == [(0, 0), (0, 9), (1, 0), (9, 9)]


@pytest.mark.parametrize("limit", [0, 25_000, 2**20])
def test_rows_in_any_order_with_groups_that_are_kept(paths, limit):
    """As many groups as fit, at least one; another process reads its own."""
    groups = arrow.Groups(is_image, limit)
    order = [(path, n) for path in paths for n in range(100)] * 2
    random.Random(0).shuffle(order)
    for number, (path, row) in enumerate(order):
        if number == 200:
            groups = pickle.loads(pickle.dumps(groups))
        first = 100 * paths.index(path)
        assert groups.row(path, row) == {"image": bytes([first + row]) * 1000}
        kept = sum(each.nbytes for each in groups._groups.values())
        assert kept == groups._bytes
        assert kept <= limit or len(groups._groups) == 1
    assert len(groups._groups) == {0: 1, 25_000: 2, 2**20: 20}[limit]


def test_more_files_than_are_kept_open(paths, monkeypatch):
    monkeypatch.setattr(arrow, "OPEN", 1)
    groups = arrow.Groups(is_image)
    for _ in range(2):
        assert [groups.row(path, 3)["image"][0] for path in paths] == [3, 103]
    assert list(groups._tables) == paths[1:]


def test_a_broken_file(tmp_path, paths):
    paths[0].write_bytes(paths[0].read_bytes()[:200])
    with pytest.raises(arrow.UnreadableTable, match=r"a.parquet' is no readable .parquet file"):
        arrow.Groups(is_image).row(paths[0], 0)
