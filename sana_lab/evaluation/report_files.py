"""An evaluation's report as two artifacts of a run: `report.json`, and its numbers per image as arrays.

The numbers of 50,000 images fill 400 kB a column as float64 in a safetensors file, where a table reads the columns that
it tests; in JSON they fill 1 MB that must be parsed whole. A report names its file, by content, and is written after
it: one that is written anew leaves the old numbers until then. Reports of earlier versions hold them in JSON, and are
read as they are.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, overload

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from sana_lab.config.specs import SpecError
from sana_lab.tracking.store import Store
from sana_lab.types import Json

REPORT = "report.json"
NUMBERS = "per_image_file"
"""Key of a report: the name of the file of its numbers per image."""


@dataclass(frozen=True)
class StoredColumn(Sequence[float]):
    """The numbers per image of one column, in a file."""

    path: Path
    name: str
    length: int

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> float: ...
    @overload
    def __getitem__(self, index: slice) -> list[float]: ...
    def __getitem__(self, index: int | slice) -> float | list[float]:
        return self.read()[index]

    def __iter__(self) -> Iterator[float]:
        return iter(self.read())

    def read(self) -> list[float]:
        """All numbers. SpecError if the file is missing or damaged."""
        try:
            with safe_open(self.path, "pt") as file:
                numbers: list[float] = file.get_tensor(self.name).tolist()
        except (SafetensorError, OSError) as error:
            raise SpecError(f"{self.path} does not hold the numbers per image of {self.name!r}: {error}") from error
        return numbers


def write(store: Store, run: str, report: Json) -> None:
    """Log a report to a run."""
    columns = report.get("per_image", {})
    arrays = {name: torch.tensor(list(each["values"]), dtype=torch.float64) for name, each in columns.items()}
    if not arrays:
        store.log_dict(run, report, REPORT)
        return
    content = save(arrays)
    file = f"per_image-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
    with TemporaryDirectory() as folder:
        (Path(folder) / file).write_bytes(content)
        store.log_file(run, Path(folder) / file)
    about = {name: {**each, "values": len(arrays[name])} for name, each in columns.items()}
    store.log_dict(run, {**report, "per_image": about, NUMBERS: file}, REPORT)


def read(store: Store, run: str) -> Json:
    """The report of a run. FileNotFoundError if it has none; its numbers are looked for when they are asked for."""
    report: Json = json.loads(store.file(run, REPORT).read_text())
    columns = report.get("per_image", {})
    if not any(map(is_stored, columns.values())):
        return report
    name = report.pop(NUMBERS)
    try:
        path = store.file(run, name)
    except FileNotFoundError:
        path = store.file(run, REPORT).with_name(name)
    return {**report, "per_image": with_columns(columns, path)}


def is_stored(column: Any) -> bool:
    """Whether a column of a report as read from JSON has its numbers elsewhere, and their count here."""
    return isinstance(column, dict) and type(column.get("values")) is int


def with_columns(columns: Json, path: Path) -> Json:
    """The columns of a report as read from JSON, those that are stored with their numbers."""
    return {
        name: {**each, "values": StoredColumn(path, name, each["values"])} if is_stored(each) else each
        for name, each in columns.items()
    }
