"""Items of different lengths in safetensors shards, with an index on the disk: made by several processes, read by row.

A shard holds the items of `per_shard` rows, one after the other, in the tensor `data` (T, D). It is written whole, with
a digest; the index is written when all shards are, and reading needs no other file's header than its shard's.
"""

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sana_lab.config.atomic_write import replacing
from sana_lab.data import disk_columns
from sana_lab.data.shards import writing
from sana_lab.types import Json

OPEN = 256
"""Shards that a process keeps open."""

NUMBERS = {torch.float16: "u2", torch.bfloat16: "u2", torch.float32: "u4"}
"""Stored types, as numpy's type of the same bytes: numpy has no bfloat16."""


class Encoded(NamedTuple):
    """The items of a shard."""

    data: Tensor  # (T, D)
    lengths: Sequence[int]  # of each item along T; 0 where there is none
    unreadable: dict[str, str]  # name of a row that could not be used -> reason


Encode = Callable[[range], Encoded]
"""Rows -> their items, one or several of each row."""


class Ragged:
    """`rows` rows in `folder`, `per_shard` of them in a shard `kind-00000.safetensors`."""

    def __init__(self, folder: Path, kind: str, rows: int, per_shard: int, facts: Json) -> None:
        self.folder, self.kind, self.rows, self.per_shard, self.facts = folder, kind, rows, per_shard, facts
        self._open: OrderedDict[int, tuple[int, int]] = OrderedDict()  # shard -> (descriptor, start of its data)

    def __len__(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.per_shard)

    # making

    @property
    def complete(self) -> bool:
        """Whether all shards were written; later damage is in `broken`."""
        return disk_columns.is_table(self.folder / "index")

    def fill(self, encode: Encode, advance: Callable[[int], None] = lambda rows: None) -> None:
        """Encode the shards that are missing or broken; several processes share the work. ValueError, DiskFull."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        for patient in (False, True):  # first what no process works on, then what another one left
            for k in range(len(self)):
                self._make(k, encode, patient, advance)

    def join(self) -> None:
        """Write the index of all shards, which `fill` has made."""
        with FileLock(self.folder / "index.lock"):
            if not self.complete:
                self._join()

    def _join(self) -> None:
        unreadable: dict[str, str] = {}
        with disk_columns.Writer(self.folder / "index", _COLUMNS) as writer:
            for k in range(len(self)):
                path = self._path(k)
                with safe_open(path, "np") as file:
                    ends, about = file.get_tensor("ends"), _about(file)
                writer.extend("start", ends[:-1])
                writer.extend("length", np.diff(ends))
                writer.extend("bytes", [path.stat().st_size])
                unreadable |= about["unreadable"]
            width, kind = self._layout_of(0)
            facts = {"width": width, "type": kind, "unreadable": len(unreadable), "rows": self.rows}
            facts["examples"] = dict(list(unreadable.items())[:5])
            writer.finish({**facts, "per_shard": self.per_shard})

    def done(self) -> int:
        """Number of rows in shards that are written."""
        return sum(len(self._range(k)) for k in range(len(self)) if self._path(k).is_file())

    def _make(self, k: int, encode: Encode, patient: bool, advance: Callable[[int], None]) -> None:
        if self._fits(k):
            return
        with writing(self.folder):
            try:
                lock = FileLock(self._path(k).with_suffix(".lock")).acquire(timeout=-1 if patient else 0)
            except Timeout:
                return
        with lock:
            if not self._fits(k):
                encoded = encode(self._range(k))
                with writing(self.folder):
                    (self.folder / "index" / disk_columns.META).unlink(missing_ok=True)
                    self._write(k, encoded)
                advance(len(self._range(k)))

    def _write(self, k: int, encoded: Encoded) -> None:
        data = encoded.data.contiguous().cpu()
        if encoded.unreadable and len(encoded.lengths) > 1 and not any(encoded.lengths):
            name, why = next(iter(encoded.unreadable.items()))
            count, shard = len(encoded.lengths), self._path(k).name
            raise ValueError(f"none of {count} pictures in {shard} can be read: {name} ({why})")
        if not bool(data.isfinite().all()):
            raise ValueError(
                f"{self.kind} are not finite in {str(data.dtype).removeprefix('torch.')}, in {self._path(k).name}; "
                "choose a stored type of a larger range, such as bfloat16"
            )
        ends = torch.tensor([0, *np.cumsum(encoded.lengths, dtype=np.int64).tolist()])
        assert int(ends[-1]) == len(data)
        about = {"digest": _digest(data, ends), "unreadable": encoded.unreadable, "facts": _short(self.facts)}
        with replacing(self._path(k)) as partial:
            save_file({"data": data, "ends": ends}, partial, {"about": json.dumps(about)})

    def _fits(self, k: int) -> bool:
        """Whether a shard's file is whole, by its header and length, and was made of the same."""
        try:
            with safe_open(self._path(k), "pt") as file:
                return bool(_about(file).get("facts") == _short(self.facts))
        except (OSError, SafetensorError):
            return False

    def _range(self, k: int) -> range:
        return range(self.rows)[k * self.per_shard : (k + 1) * self.per_shard]

    def _path(self, k: int) -> Path:
        return self.folder / f"{self.kind}-{k:05}.safetensors"

    # checking

    def verify(self) -> Iterator[tuple[str, str | None]]:
        """(name of a shard's file, what is wrong with it or None), by reading all of it."""
        for k in range(len(self)):
            yield self._path(k).name, self._problem(k)

    def discard(self, name: str) -> None:
        """Remove a broken shard and the index, so that `fill` makes them again."""
        (self.folder / "index" / disk_columns.META).unlink(missing_ok=True)
        (self.folder / name).unlink(missing_ok=True)

    def _problem(self, k: int) -> str | None:
        if not self._path(k).is_file():
            return "is missing"
        try:
            with safe_open(self._path(k), "pt") as file:
                data, ends, about = file.get_tensor("data"), file.get_tensor("ends"), _about(file)
        except (OSError, SafetensorError) as error:
            return f"cannot be read: {error}"
        if about.get("facts") != _short(self.facts):
            return "was made of other data or by another encoder"
        if about.get("digest") != _digest(data, ends):
            return "has other content than was written"
        if not bool(data.isfinite().all()):
            return "holds numbers that are not finite"
        faults = [f"{name} ({why})" for name, why in about["unreadable"].items()]
        return f"lacks {len(faults)} pictures that could not be read: {', '.join(faults[:3])}" if faults else None

    @cached_property
    def broken(self) -> dict[int, str]:
        """Shards whose file is missing or has another length than when it was written -> the name of the file."""
        sizes = (self._size(k) for k in range(len(self)))
        return {
            k: self._path(k).name for k, (a, b) in enumerate(zip(sizes, self.table["bytes"], strict=True)) if a != b
        }

    def _size(self, k: int) -> int:
        try:
            return self._path(k).stat().st_size
        except OSError:
            return -1

    # reading

    @cached_property
    def table(self) -> disk_columns.Table:
        """The index."""
        return disk_columns.Table(self.folder / "index")

    def lengths(self, items: NDArray[np.integer]) -> NDArray[np.int64]:
        """Length of each item along T."""
        return self.table["length"][items].astype(np.int64)

    def usable(self) -> NDArray[np.bool_]:
        """Mask (rows,) of the rows whose shard is whole and whose item is present, of a store with one item a row."""
        mask = np.ones(self.rows, bool)
        for k in self.broken:
            mask[k * self.per_shard : (k + 1) * self.per_shard] = False
        if self.table.meta["unreadable"]:
            mask &= self.table["length"][:] > 0
        return mask

    def read(self, rows: NDArray[np.integer], items: NDArray[np.integer], multiple: int = 1) -> Tensor:
        """Items (B, L, D) of these rows, zeros after each one's end; L is the longest, rounded up to a multiple."""
        starts, lengths = self.table["start"][items], self.lengths(items)
        width, kind = self.table.meta["width"], getattr(torch, self.table.meta["type"])
        longest = -(-int(lengths.max()) // multiple) * multiple
        out = np.empty((len(items), longest, width), NUMBERS[kind])  # numpy asks for huge pages, torch does not
        for at, (row, start, length) in enumerate(zip(rows.tolist(), starts.tolist(), lengths.tolist(), strict=True)):
            descriptor, begin = self._descriptor(row // self.per_shard)
            target = out[at, :length]
            if _read_into(target, descriptor, begin + start * width * out.itemsize) != target.nbytes:
                raise ValueError(f"{self._path(row // self.per_shard)} is truncated; run `sana-lab cache` again")
            out[at, length:] = 0
        return torch.from_numpy(out).view(kind)

    def _descriptor(self, k: int) -> tuple[int, int]:
        """Descriptor of a shard's file and where its data begin."""
        if k in self._open:
            self._open.move_to_end(k)
            return self._open[k]
        if len(self._open) >= OPEN:
            os.close(self._open.popitem(last=False)[1][0])
        descriptor = os.open(self._path(k), os.O_RDONLY)
        size = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        header = json.loads(os.pread(descriptor, size, 8))
        self._open[k] = (descriptor, 8 + size + header["data"]["data_offsets"][0])
        return self._open[k]

    def _layout_of(self, k: int) -> tuple[int, str]:
        """Width D and type of a shard's data."""
        with safe_open(self._path(k), "pt") as file:
            data = file.get_slice("data")
            empty = data[0:0]
            return int(data.get_shape()[1]), str(empty.dtype).removeprefix("torch.")

    def __del__(self) -> None:
        for descriptor, _ in getattr(self, "_open", {}).values():
            os.close(descriptor)

    def __getstate__(self) -> dict[str, object]:
        """Without descriptors and maps, which another process opens itself."""
        return {**{k: v for k, v in self.__dict__.items() if k != "table"}, "_open": OrderedDict()}


_COLUMNS = {"start": "i8", "length": "i4", "bytes": "i8"}


def _read_into(target: NDArray, descriptor: int, offset: int) -> int:
    """Read the bytes of a contiguous array; how many there are."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [target.data], offset)
    content = os.pread(descriptor, target.nbytes, offset)
    target.reshape(-1).view(np.uint8)[: len(content)] = np.frombuffer(content, np.uint8)
    return len(content)


def _about(file: Any) -> Json:
    """What is written in a shard's header, as one field, so that equal shards are equal files."""
    about: Json = json.loads((file.metadata() or {}).get("about", "{}"))
    return about


def _short(facts: Json) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _digest(data: Tensor, ends: Tensor) -> str:
    digest = hashlib.sha256(f"{data.dtype} {tuple(data.shape)}".encode())
    for tensor in (data, ends):
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
