"""Digests of files and folders that a configuration names: a model is known by what was in them, not by their path."""

import hashlib
import json
import os
import time
from pathlib import Path

KNOWN = Path("runs", "digests.json")
"""Digests of large files by path, size and time of change, so that gigabytes are read once."""

LARGE = 2**26  # bytes; smaller files are read again by each process
FRESH = 2.0  # seconds in which a file may change again within one tick of its clock
READ = (".safetensors", ".json", ".bin", ".pth", ".pt", ".model", ".txt", ".jinja")
"""What folders of models are read for; a note beside them changes nothing."""

_seen: dict[str, str] = {}


def content(path: Path) -> str:
    """SHA-256 of a file, or of a folder's models, settings and vocabularies under their names. OSError."""
    if not path.is_dir():
        return _file(path)
    inside = sorted(p for p in path.rglob("*") if p.suffix in READ and p.is_file() and not _hidden(p, path))
    listed = [f"{p.relative_to(path).as_posix()} {_file(p)}" for p in inside]
    return hashlib.sha256("\n".join(listed).encode()).hexdigest()


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _file(path: Path) -> str:
    """A digest that was taken before, of the file as it is, or a new one; what changed a moment ago is read again."""
    about = path.stat()
    key = f"{path.absolute()} {about.st_size} {about.st_mtime_ns} {about.st_ino}"
    settled = time.time() - about.st_mtime > FRESH
    known = {**_kept(), **_seen} if about.st_size >= LARGE else _seen
    if settled and key in known:
        return known[key]
    found = _read(path)
    if settled:
        _seen[key] = found
        if about.st_size >= LARGE:
            _keep(key, found)
    return found


def _read(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _kept() -> dict[str, str]:
    try:
        found = json.loads(KNOWN.read_text())
    except (OSError, ValueError):  # none yet, or cut short: files are read again
        return {}
    return found if isinstance(found, dict) else {}


def _keep(key: str, digest: str) -> None:
    """Beside the others, where the folder of runs can be written; without it the file is read again next time."""
    draft = KNOWN.with_suffix(f".{os.getpid()}")
    try:
        KNOWN.parent.mkdir(exist_ok=True)
        draft.write_text(json.dumps({**_kept(), key: digest}, indent=1))
        draft.replace(KNOWN)
    except OSError:
        return
