"""`layout: mjhq`: MJHQ-30K (arXiv 2402.17245) as it is unpacked."""

from collections.abc import Iterator
from pathlib import Path

from sana_lab.data import importers
from sana_lab.data.layouts import Layout, Place, Record


class Mjhq(Layout):
    """`meta_data.json`, {id: {category, prompt}}, beside pictures in folders of categories; no option."""

    def __init__(self, root: Path, /) -> None:
        super().__init__(root)
        self._rows = importers.mjhq_rows(root)
        names = (row["file_name"] for row in self._rows)
        self.files = ["meta_data.json", *(name for name in names if (root / name).is_file())]

    def records(self) -> Iterator[Record]:
        """The pictures in the order of the table."""
        present = {*self.files}
        for row in self._rows:
            if row["file_name"] in present:
                yield Record(row["file_name"], (row["caption"],))
            else:
                self.skipped[row["file_name"]] = "is missing"

    def read(self, name: str, place: Place) -> bytes:
        """The file of that name."""
        return (self.root / name).read_bytes()
