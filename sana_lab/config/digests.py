"""SHA-256 of files and folders that a configuration names, so that a model is known by its numbers, not by its path.

Digests are cached by path, size, time of change and inode: in memory, and beyond 64 MiB also in runs/digests.json, so
that gigabytes are read once.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from sana_lab.config.atomic_write import write_text

CACHE = Path("runs", "digests.json")
"""Digests of large files and folders under their keys; without it they are computed again."""

LARGE = 2**26  # bytes from which a digest is cached on disk
FRESH = 2.0  # seconds in which a file may change again without a new time of change
MODEL_FILES = (".safetensors", ".json", ".bin", ".pth", ".pt", ".model", ".txt", ".jinja")
"""Files of a model's folder that enter its digest: weights, settings and vocabularies."""

_memory: dict[str, str] = {}


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits. OSError."""
    return _cached("file", [path], lambda: _read(path))


def model(path: Path) -> str:
    """SHA-256 of a file, or of the MODEL_FILES in a folder with their names. OSError."""
    return folder(path, MODEL_FILES) if path.is_dir() else sha256(path)


def folder(path: Path, suffixes: tuple[str, ...] | None = None) -> str:
    """SHA-256 of the names and bytes of all files below a folder, without hidden ones. OSError."""
    inside = [p for p in path.rglob("*") if suffixes is None or p.suffix in suffixes]
    paths = sorted(p for p in inside if p.is_file() and not _is_hidden(p, path))
    names = [p.relative_to(path).as_posix() for p in paths]
    return _cached(f"folder {path.absolute()}", paths, lambda: _listing(zip(names, map(_read, paths), strict=True)))


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _listing(lines: Iterable[tuple[object, ...]]) -> str:
    return hashlib.sha256("\n".join(" ".join(map(str, line)) for line in lines).encode()).hexdigest()


def _cached(what: str, paths: list[Path], compute: Callable[[], str]) -> str:
    """The cached digest of these files, or a new one; files that changed within FRESH seconds are read again."""
    stats = [path.stat() for path in paths]
    listed = [(p.absolute(), s.st_size, s.st_mtime_ns, s.st_ino) for p, s in zip(paths, stats, strict=True)]
    key = _listing([(what,), *listed])
    settled = all(time.time() - s.st_mtime > FRESH for s in stats)
    large = sum(s.st_size for s in stats) >= LARGE
    if not settled:
        return compute()
    if key not in _memory:
        _memory[key] = (_on_disk().get(key) if large else None) or compute()
        if large:
            _keep(key, _memory[key])
    return _memory[key]


def _read(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _on_disk() -> dict[str, str]:
    try:
        cached = json.loads(CACHE.read_text())
    except (OSError, ValueError):  # none yet, or cut short
        return {}
    return cached if isinstance(cached, dict) else {}


def _keep(key: str, digest: str) -> None:
    """Add to the cache on disk, if the folder of runs can be written."""
    cached = _on_disk()
    if key not in cached:
        with suppress(OSError):
            write_text(CACHE, json.dumps({**cached, key: digest}, indent=1))
