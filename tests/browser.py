"""Pages as headless Chromium shows them, for tests and pictures: Debian's package `chromium`."""

import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
PROGRAM = next((path for name in NAMES if (path := shutil.which(name))), None)

needs_chromium = pytest.mark.skipif(PROGRAM is None, reason="no Chromium: apt-get install chromium")


def chromium(url: str, *options: str, width: int = 1280, height: int = 900, milliseconds: int = 60_000) -> str:
    """What Chromium prints after the page's scripts have run for so long of its own, virtual time."""
    assert PROGRAM is not None
    with tempfile.TemporaryDirectory() as profile:
        fixed = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        shape = [f"--window-size={width},{height}", f"--virtual-time-budget={milliseconds}"]
        command = [PROGRAM, *fixed, *shape, *options, url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=True)
    return done.stdout


def text_of(url: str, **shape: int) -> str:
    """The page's elements as HTML."""
    return chromium(url, "--dump-dom", **shape)


def picture(url: str, path: Path, *options: str, **shape: int) -> Path:
    """A PNG of the page."""
    chromium(url, f"--screenshot={path}", *options, **shape)
    return path
