"""Rows of .parquet and .arrow files, a group of rows in memory at a time."""

import bisect
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

BATCH = 1024
"""Rows that are read at a time, in order, at most."""

BATCH_BYTES = 2**25
"""Bytes of such rows, about; one row may have more."""

BUFFER = 2**20
"""Bytes of each column of a Parquet file that are read at a time, in order."""

KEPT = 2**28
"""Bytes of the groups of rows that `Groups` keeps."""

OPEN = 128
"""Files that `Groups` keeps open."""


class UnreadableTable(ValueError):
    """A file that cannot be read, or not to its end; the message has its name."""


class Table:
    """The rows of a file in order, as plain data, or a group of rows. UnreadableTable; ImportError without pyarrow."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._reading():
            sizes = [self._size(k) for k in range(self._groups)]
        self.ends = list(itertools.accumulate(sizes))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows. Every byte is read once, and a batch is in memory."""
        for number in range(self._groups):
            yield from self._rows(number, self._step(number))

    @property
    def columns(self) -> dict[str, bool]:
        """Name of each column -> whether it holds bytes or structures, as pictures are stored; by the schema alone."""
        types = _pyarrow().types
        tests = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_struct)
        return {field.name: any(test(field.type) for test in tests) for field in self._schema}

    def _rows(self, number: int, step: int) -> Iterator[dict[str, Any]]:
        with self._reading():
            batches = self._batches(number, step)
        while True:
            with self._reading():
                batch = next(batches, None)
            if batch is None:
                return
            for first in range(0, len(batch), step):
                yield from batch.slice(first, step).to_pylist()

    def place(self, number: int) -> tuple[int, int]:
        """(group, place in it) of a row."""
        group = bisect.bisect_right(self.ends, number)
        return group, number - (self.ends[group - 1] if group else 0)

    def group(self, number: int, is_used: Callable[[str], bool]) -> Any:
        """The columns of a group of rows whose name passes, as pyarrow's table or batch of records."""
        with self._reading():
            if isinstance(self._file, list):
                return self._file[number].select([name for name in self._schema.names if is_used(name)])
            return self._file.read_row_group(number, [name for name in self._schema.names if is_used(name)])

    @cached_property
    def _file(self) -> Any:
        pyarrow = _pyarrow()
        if self.path.suffix.lower() == ".parquet":
            from pyarrow.parquet import ParquetFile

            return ParquetFile(self.path)
        source = pyarrow.memory_map(str(self.path))
        try:  # the two formats of Arrow: the stream, which Hugging Face's datasets writes, and the file
            return list(pyarrow.ipc.open_stream(source))
        except pyarrow.ArrowInvalid:
            source.seek(0)
            reader = pyarrow.ipc.open_file(source)
            return [reader.get_batch(k) for k in range(reader.num_record_batches)]

    @property
    def _schema(self) -> Any:
        if not isinstance(self._file, list):
            return self._file.schema_arrow
        return self._file[0].schema if self._file else _pyarrow().schema([])

    @property
    def _groups(self) -> int:
        return len(self._file) if isinstance(self._file, list) else self._file.num_row_groups

    def _size(self, group: int) -> int:
        file = self._file
        return len(file[group]) if isinstance(file, list) else file.metadata.row_group(group).num_rows

    def _step(self, group: int) -> int:
        """Rows of a group that have about BATCH_BYTES."""
        file = self._file
        size = file[group].nbytes if isinstance(file, list) else file.metadata.row_group(group).total_byte_size
        return max(1, min(BATCH, BATCH_BYTES * self._size(group) // max(size, 1)))

    def _batches(self, group: int, step: int) -> Iterator[Any]:
        if isinstance(self._file, list):
            return iter([self._file[group]])
        batches: Iterator[Any] = self._stream.iter_batches(step, row_groups=[group])
        return batches

    @cached_property
    def _stream(self) -> Any:
        """A Parquet file of which a part of each column is in memory."""
        from pyarrow.parquet import ParquetFile

        return ParquetFile(self.path, metadata=self._file.metadata, buffer_size=BUFFER)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        pyarrow = _pyarrow()
        try:
            yield
        except (pyarrow.ArrowException, OSError) as error:
            raise UnreadableTable(f"{str(self.path)!r} is no readable {self.path.suffix} file: {error}") from error


class Groups:
    """Rows of several files by number, of the columns whose name passes `is_used`.

    A row is read with its group; the groups that were used last are kept, up to `limit` bytes and at least one.
    """

    def __init__(self, is_used: Callable[[str], bool], limit: int = KEPT) -> None:
        self.is_used, self.limit = is_used, limit
        self._forget()

    def row(self, path: Path, number: int) -> dict[str, Any]:
        """One row of a file, as plain data. UnreadableTable; ImportError without pyarrow."""
        with self._lock:
            group, place = self._table(path).place(number)
            rows = self._group(path, group)
        row: dict[str, Any] = rows.slice(place, 1).to_pylist()[0]
        return row

    def _table(self, path: Path) -> Table:
        table = self._tables.pop(path, None) or Table(path)
        self._tables[path] = table
        if len(self._tables) > OPEN:
            self._tables.popitem(last=False)
        return table

    def _group(self, path: Path, number: int) -> Any:
        key = (path, number)
        if key in self._groups:
            self._groups.move_to_end(key)
            return self._groups[key]
        rows = self._tables[path].group(number, self.is_used)
        self._bytes += rows.nbytes
        while self._groups and self._bytes > self.limit:
            self._bytes -= self._groups.popitem(last=False)[1].nbytes
        self._groups[key] = rows
        return rows

    def _forget(self) -> None:
        self._tables: OrderedDict[Path, Table] = OrderedDict()
        self._groups: OrderedDict[tuple[Path, int], Any] = OrderedDict()
        self._bytes, self._lock = 0, threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Without files and rows; a worker process reads its own."""
        return {"is_used": self.is_used, "limit": self.limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise ImportError(
            "Parquet and Arrow files need pyarrow; install it with `pip install 'sana_lab[parquet]'`"
        ) from error
    return pyarrow
