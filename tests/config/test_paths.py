"""Places that cannot be written are reported before any work."""

from pathlib import Path

import pytest

from sana_lab.config import paths


def test_a_file_that_can_be_written_is_left_as_it_was(here: Path):
    paths.check_file(None)
    paths.check_file(Path("new.json"))
    assert not Path("new.json").exists()
    Path("old.json").write_text("kept")
    paths.check_file(Path("old.json"))
    assert Path("old.json").read_text() == "kept"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/proc/x.json", "cannot write /proc/x.json: No such file"),
        (".", "it is a folder, expected a file, such as results.json"),
        ("nowhere/x.json", "there is no folder /.*/nowhere"),
    ],
)
def test_a_file_that_cannot(here: Path, path: str, words: str):
    with pytest.raises(ValueError, match=words):
        paths.check_file(Path(path))


@pytest.mark.parametrize("path", ["/proc/x", "/sys", "file/x"])
def test_a_folder_that_cannot(here: Path, path: str):
    Path("file").touch()
    with pytest.raises(ValueError, match=f"cannot write to .*{path}: .*; expected a folder that you can write"):
        paths.check_folder(Path(path))


def test_a_folder_is_made_and_stays_empty(here: Path):
    paths.check_folder(Path("a/b"))
    assert list(Path("a/b").iterdir()) == []


def test_files_of_the_user_stay_as_they_are(here: Path):
    """One with the name of the lab's own probe was deleted."""
    for name in ("writable", "tmp", ".writable"):
        Path(name).write_text(name)
    paths.check_folder(here)
    assert {p.name: p.read_text() for p in here.iterdir()} == {n: n for n in ("writable", "tmp", ".writable")}
