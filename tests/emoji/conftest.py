"""Tiny archives for every test of emoji that asks."""

from pathlib import Path

import pytest
import tiny_emoji


@pytest.fixture
def emoji(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder `emoji` of the working directory, with tiny archives."""
    return tiny_emoji.write(here / "emoji", monkeypatch)
