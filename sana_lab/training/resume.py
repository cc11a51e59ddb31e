"""Checkpoints of a training run: the newest, and the newest that can be read."""

import sys
from pathlib import Path

from sana_lab.checkpoints import files
from sana_lab.config.specs import SpecError


def latest(home: Path) -> str | None:
    """The newest checkpoint."""
    found = _checkpoints(home)
    return str(found[0]) if found else None


def resumable(home: Path) -> str | None:
    """The newest checkpoint that is whole. SpecError where there are some, and none is: it names what to delete."""
    found = _checkpoints(home)
    for path in found:
        try:
            files.read_torch(path)
            return str(path)
        except SpecError as error:
            print(f"sana-lab: left out: {error}", file=sys.stderr)
    if found:
        named = " ".join(str(path) for path in found)
        raise SpecError(f"no checkpoint in {home} can be read; to train from the beginning, delete {named}")
    return None


def _checkpoints(home: Path) -> list[Path]:
    """The newest first."""
    return sorted(home.glob("*.ckpt"), key=lambda p: p.stat().st_mtime, reverse=True)
