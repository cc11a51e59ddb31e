"""Sizes of caches before they are written: what is stored already, and the tokens that captions have at least."""

from collections.abc import Sequence
from pathlib import Path


def stored_bytes(folder: Path) -> int:
    """Bytes of all files in a folder; 0 if there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def least_tokens(captions: Sequence[str], most: int) -> int:
    """Tokens of captions together, one for each word and at most `most` for each caption: tokenizers give more."""
    return sum(min(most, max(1, len(caption.split()))) for caption in captions)
