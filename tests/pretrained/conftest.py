"""What the tests of released weights share."""

from pathlib import Path

import pytest

from sana_lab.pretrained import loading
from sana_lab.systems.text2image import TextToImage


@pytest.fixture(scope="session")
def system(sana_folder: Path) -> TextToImage:
    """The system of `sana_folder`. Do not change it but by monkeypatch."""
    return loading.load(sana_folder)
