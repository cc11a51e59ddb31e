"""Checkpoints of a training run: the newest, and the newest that can be read."""

import sys
from pathlib import Path

from sana_lab.checkpoints import files
from sana_lab.config.specs import SpecError


def latest(home: Path) -> str | None:
    """The newest checkpoint."""
    checkpoints = _checkpoints(home)
    return str(checkpoints[0]) if checkpoints else None


def resumable(home: Path) -> str | None:
    """The newest readable checkpoint; SpecError listing the files to delete if none of the checkpoints is readable."""
    checkpoints = _checkpoints(home)
    for path in checkpoints:
        try:
            files.read_torch(path)
            return str(path)
        except SpecError as error:
            print(f"sana-lab: left out: {error}", file=sys.stderr)
    if checkpoints:
        names = " ".join(str(path) for path in checkpoints)
        raise SpecError(f"no checkpoint in {home} can be read; to train from the beginning, delete {names}")
    return None


def _checkpoints(home: Path) -> list[Path]:
    """Newest first."""
    return sorted(home.glob("*.ckpt"), key=lambda p: p.stat().st_mtime, reverse=True)
