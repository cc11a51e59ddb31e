"""A table on the disk, a file per column, read through memory maps: nothing of it is held in memory.

A column has a number per row, or, as `spans` of a longer column, the place of its first and last element there. Text
is a span of bytes.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from sana_lab.config.atomic_write import explaining_full_disk, write_text
from sana_lab.types import Json

META = "table.json"
"""Written last: a folder without it holds no table."""


class Writer:
    """Appends rows to the columns of a new table; a context, which `finish` completes."""

    def __init__(self, folder: Path, types: Mapping[str, str]) -> None:
        self.folder, self.types = folder, dict(types)
        self.lengths = dict.fromkeys(types, 0)
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> "Writer":
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / META).unlink(missing_ok=True)
        for name in self.types:  # a process that has mapped an old file keeps it
            (self.folder / f"{name}.bin").unlink(missing_ok=True)
        self._files = {name: (self.folder / f"{name}.bin").open("wb") for name in self.types}
        return self

    def extend(self, name: str, values: Sequence[Any] | NDArray | bytes) -> None:
        """Append to one column."""
        array = np.frombuffer(values, np.uint8) if isinstance(values, bytes) else np.asarray(values)
        with explaining_full_disk(self.folder):
            self._files[name].write(np.ascontiguousarray(array, self.types[name]).tobytes())
        self.lengths[name] += len(array)

    def finish(self, meta: Json) -> None:
        """Close the files and write what the table is about."""
        self.__exit__(None, None, None)
        columns = {name: [kind, self.lengths[name]] for name, kind in self.types.items()}
        write_text(self.folder / META, json.dumps({"columns": columns, **meta}, indent=1))

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        while self._files:
            with explaining_full_disk(self.folder):
                self._files.popitem()[1].close()


class Table:
    """A table that was written. ValueError where a file is missing or has another length."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: Json = json.loads((folder / META).read_text("utf-8"))
        for name, (kind, length) in self.meta["columns"].items():
            path = folder / f"{name}.bin"
            if not path.is_file() or path.stat().st_size != length * np.dtype(kind).itemsize:
                raise ValueError(f"{str(path)!r} is missing or truncated; delete {str(folder)!r}, which is made again")

    def __getitem__(self, name: str) -> NDArray:
        """A column."""
        return self._columns[name]

    @cached_property
    def _columns(self) -> dict[str, NDArray]:
        return {name: self._map(name, kind, length) for name, (kind, length) in self.meta["columns"].items()}

    def _map(self, name: str, kind: str, length: int) -> NDArray:
        path = self.folder / f"{name}.bin"
        return np.memmap(path, kind, "r", shape=(length,)) if length else np.empty(0, kind)

    def text(self, name: str, row: int) -> str:
        """The text that column `name_end` closes, of one row."""
        ends = self[f"{name}_end"]
        return bytes(self[name][int(ends[row - 1]) if row else 0 : int(ends[row])]).decode("utf-8")

    def __getstate__(self) -> dict[str, Any]:
        """Without the maps; another process opens its own."""
        return {k: v for k, v in self.__dict__.items() if k != "_columns"}


def is_table(folder: Path) -> bool:
    """Whether a folder holds a complete table."""
    return (folder / META).is_file()
