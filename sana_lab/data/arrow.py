"""Rows of .parquet and .arrow files, a group of rows in memory at a time."""

import bisect
import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

BATCH = 1024
"""Rows of a Parquet file that are read at a time, in order."""


class UnreadableTable(ValueError):
    """A file that cannot be read, or not to its end; the message has its name."""


class Table:
    """The rows of a file in order or by number, as plain data. UnreadableTable; ImportError without pyarrow."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._group: tuple[int, Any] = (-1, None)
        self._lock = threading.Lock()
        with self._reading():
            sizes = [self._size(k) for k in range(self._groups)]
        self.ends = list(itertools.accumulate(sizes))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows."""
        for number in range(self._groups):
            with self._reading():
                batches = self._batches(number)
            while True:
                with self._reading():
                    batch = next(batches, None)
                if batch is None:
                    break
                yield from batch.to_pylist()

    def row(self, number: int) -> dict[str, Any]:
        """One row; its group is kept until a row of another is read."""
        group = bisect.bisect_right(self.ends, number)
        with self._lock:
            if group != self._group[0]:
                with self._reading():
                    self._group = (group, self._read(group))
            rows = self._group[1]
        return rows.slice(number - (self.ends[group - 1] if group else 0), 1).to_pylist()[0]

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
    def _groups(self) -> int:
        return len(self._file) if isinstance(self._file, list) else self._file.num_row_groups

    def _size(self, group: int) -> int:
        file = self._file
        return len(file[group]) if isinstance(file, list) else file.metadata.row_group(group).num_rows

    def _read(self, group: int) -> Any:
        return self._file[group] if isinstance(self._file, list) else self._file.read_row_group(group)

    def _batches(self, group: int) -> Iterator[Any]:
        if isinstance(self._file, list):
            return iter([self._file[group]])
        batches: Iterator[Any] = self._file.iter_batches(BATCH, row_groups=[group])
        return batches

    @contextmanager
    def _reading(self) -> Iterator[None]:
        pyarrow = _pyarrow()
        try:
            yield
        except (pyarrow.ArrowException, OSError) as error:
            raise UnreadableTable(f"{str(self.path)!r} is no readable {self.path.suffix} file: {error}") from error


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise ImportError(
            "Parquet and Arrow files need pyarrow; install it with `pip install 'sana_lab[parquet]'`"
        ) from error
    return pyarrow
