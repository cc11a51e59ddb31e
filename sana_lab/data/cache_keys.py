"""What a cache was made of, as a record beside it, and how two records differ."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sana_lab.config.atomic_write import write_text
from sana_lab.config.specs import SpecError
from sana_lab.types import Json

RECORD = "made_of.json"
SHARD = "shard"
"""How many pictures are in a shard: it is no reason for another cache."""


def folder(cache: Path, kind: str, facts: Json) -> Path:
    """The folder in `cache` of what is made of these facts: `kind-KEY`."""
    return cache / f"{kind}-{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]}"


def shard(path: Path) -> int | None:
    """The number of pictures in a shard of a cache that was begun."""
    return int(_read(path)[SHARD]) if (path / RECORD).is_file() else None


def begin(path: Path, facts: Json, shard: int) -> list[str]:
    """Write the record into a new folder; how it differs from others of the same kind and pictures, a line for each."""
    if (path / RECORD).is_file():
        return []
    others = {other: _read(other) for other in sorted(path.parent.glob(f"{path.name.rpartition('-')[0]}-*/{RECORD}"))}
    write_text(path / RECORD, json.dumps({**facts, SHARD: shard}, indent=1, sort_keys=True))
    same = {o.parent: r for o, r in others.items() if r.get("pictures") == facts["pictures"]}
    return [f"{other} was made with {'; '.join(differences(record, facts))}" for other, record in same.items()]


def check(path: Path, kind: str, facts: Json) -> None:
    """SpecError with what differs if `path` is a cache of this kind that was made of something else."""
    if (path / RECORD).is_file():
        lines = differences(_read(path), facts)
        if lines:
            raise SpecError(f"the cache {str(path)!r} was made with {'; '.join(lines)}")


def differences(earlier: Json, given: Json) -> list[str]:
    """Each option that differs: `text_encoder.max_tokens 300, not 77`."""
    one, other = dict(_leaves(earlier)), dict(_leaves(given))
    paths = [path for path in {**one, **other} if path != SHARD and one.get(path) != other.get(path)]
    return [f"{path} {_shortened(one.get(path))}, not {_shortened(other.get(path))}" for path in paths]


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}".lstrip("."))
    else:
        yield path, value


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _read(path: Path) -> Json:
    record: Json = json.loads((path if path.is_file() else path / RECORD).read_text("utf-8"))
    return record
