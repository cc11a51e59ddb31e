"""Digests of files and folders, and their cache."""

import hashlib
import os
from pathlib import Path

import pytest
from tiny import write

from sana_lab.config import digests


def test_a_large_file_is_read_once_until_it_changes(here: Path, monkeypatch):
    monkeypatch.setattr(digests, "LARGE", 10)
    monkeypatch.setattr(digests, "_memory", {})
    path = write(here, "large.bin", "x" * 20)
    digest = digests.sha256(path)
    assert not digests.CACHE.exists()  # it changed a moment ago, and may again without its clock telling
    os.utime(path, (1, 1))
    assert digests.sha256(path) == digest
    monkeypatch.setattr(digests, "_memory", {})
    monkeypatch.setattr(digests, "_read", lambda _: "read again")
    assert digests.sha256(path) == digest
    os.utime(path, (2, 2))
    assert digests.sha256(path) == "read again"
    digests.CACHE.write_text("cut sho")
    assert digests.sha256(path) == "read again"


def test_a_folder_is_its_names_and_bytes_and_is_read_once(here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(digests, "LARGE", 10)
    monkeypatch.setattr(digests, "_memory", {})
    paths = [write(here, f"pictures/{name}", "x" * 20) for name in ("a.png", "b.png")]
    for path in paths:
        os.utime(path, (1, 1))
    before = digests.folder(Path("pictures"))
    monkeypatch.setattr(digests, "_memory", {})
    with monkeypatch.context() as patch:
        patch.setattr(digests, "_read", lambda _: pytest.fail("read again"))
        assert digests.folder(Path("pictures")) == before
    write(here, "pictures/b.png", "x" * 19 + "y")
    assert digests.folder(Path("pictures")) != before
    paths[1].rename("pictures/c.png")
    assert digests.sha256(Path("pictures/c.png")) == hashlib.sha256(b"x" * 19 + b"y").hexdigest()


def test_a_folder_of_a_model_is_not_its_notes(here: Path):
    write(here, "model/config.json", "{}")
    before = digests.model(Path("model"))
    write(here, "model/README.md", "a note")
    write(here, "model/.cache/config.json", "{}")
    assert digests.model(Path("model")) == before
    write(here, "model/tokenizer.model", "words")
    assert digests.model(Path("model")) != before
