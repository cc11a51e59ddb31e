"""Values grouped by name in a temporary database, which the disk holds where memory is short."""

import itertools
import json
import sqlite3
import weakref
from collections.abc import Iterable, Iterator
from operator import itemgetter
from typing import Any


class DiskGroups:
    """Plain values by name. Iterates, as often as asked, in the order of names: (name, its values as they came)."""

    def __init__(self, items: Iterable[tuple[str, Any]]) -> None:
        self._database = sqlite3.connect("", check_same_thread=False)  # a file that is removed when it is closed
        weakref.finalize(self, self._database.close)
        self._database.execute("CREATE TABLE items (name BLOB, value TEXT)")
        rows = ((name.encode("utf-8", "surrogatepass"), json.dumps(value)) for name, value in items)
        self._database.executemany("INSERT INTO items VALUES (?, ?)", rows)

    def __len__(self) -> int:
        """Number of names."""
        count: int = self._database.execute("SELECT COUNT(DISTINCT name) FROM items").fetchone()[0]
        return count

    def __bool__(self) -> bool:
        return self._database.execute("SELECT 1 FROM items LIMIT 1").fetchone() is not None

    def __iter__(self) -> Iterator[tuple[str, list[Any]]]:
        rows = self._database.execute("SELECT name, value FROM items ORDER BY name, rowid")
        for name, group in itertools.groupby(rows, itemgetter(0)):
            yield name.decode("utf-8", "surrogatepass"), [json.loads(value) for _, value in group]
