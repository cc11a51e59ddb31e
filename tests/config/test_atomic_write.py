"""Atomic writes: whole files or none, and one line where the disk is full."""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sana_lab.config.atomic_write import replacing, replacing_folder, write_text


@contextmanager
def small_disk(limit: int) -> Iterator[None]:
    """A limit on the size of files, which fails a write as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_replaces_the_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    write_text(tmp_path / "deep" / "a.txt", "first")
    write_text(tmp_path / "deep" / "a.txt", "second")
    assert (tmp_path / "deep" / "a.txt").read_text() == "second"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.txt"]


def interrupted_write(path: Path, error: type[BaseException]) -> None:
    path.write_text("half")
    raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as partial:
        interrupted_write(partial, error)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


WRITERS = {
    "text": lambda path: path.write_bytes(b"x" * 100_000),
    "safetensors": lambda path: save_file({"a": torch.zeros(100_000)}, path),
    "torch": lambda path: torch.save({"a": torch.zeros(100_000)}, path),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_one_line_with_path_and_room(tmp_path: Path, writer: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_text("old")
    no_room = pytest.raises(OSError, match=r"no room for it: .* MiB are free in")
    with small_disk(10_000), no_room as caught, replacing(path) as partial:
        WRITERS[writer](partial)
    assert caught.value.filename == str(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with replacing_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("a")
        assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "a"]
    with pytest.raises(ValueError, match="half"), replacing_folder(tmp_path / "other") as partial:
        interrupted_folder(partial)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def interrupted_folder(path: Path) -> None:
    (path / "a").write_text("a")
    raise ValueError("half")
