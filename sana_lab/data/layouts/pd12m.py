"""`layout: pd12m`: PD12M (arXiv 2410.23144) and sets like it: Parquet tables of addresses, and downloaded pictures."""

from collections.abc import Iterator
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from sana_lab.data import arrow, image_formats
from sana_lab.data.layouts import Layout, Place, Record, below
from sana_lab.data.layouts.rows import described
from sana_lab.data.tables import column


class Pd12m(Layout):
    """Tables with the columns id, url and caption (`metadata/*.parquet`), and pictures anywhere below the root, called
    after the id or the last part of the address. Rows whose picture was not downloaded are skipped; no option."""

    def __init__(self, root: Path, /) -> None:
        super().__init__(root)
        self.tables = below(root, [".parquet"])
        if not self.tables:
            raise ValueError(f"layout 'pd12m': there is no .parquet below {str(root)!r}")
        self.pictures = below(root, tuple(image_formats.endings()))

    @property
    def files(self) -> list[str]:  # type: ignore[override]
        """The tables and the pictures."""
        return [*self.tables, *self.pictures]

    def records(self) -> Iterator[Record]:
        """The rows of each table whose picture is present."""
        by_stem, ambiguous = dict[str, int](), dict[str, str]()
        for number, name in enumerate(self.pictures, len(self.tables)):
            first = by_stem.setdefault(PurePath(name).stem, number)
            if first != number:
                ambiguous[PurePath(name).stem] = f"both {self.files[first]} and {name} are called so"
        for table in self.tables:
            for at, given in enumerate(arrow.Table(self.root / table).rows(), 1):
                row, where = {column(k): v for k, v in given.items()}, f"{table}:{at}"
                stem = next((stem for stem in _stems(row, where) if stem in by_stem), None)
                if stem is None or stem in ambiguous:
                    self.skipped[where] = "its picture is missing" if stem is None else ambiguous[stem]
                    continue
                captions, scores, group, split = described(row, where)
                if captions:
                    yield Record(self.files[by_stem[stem]], captions, Place(by_stem[stem]), scores, group, split)
                else:
                    self.skipped[where] = "no caption"

    def read(self, name: str, place: Place) -> bytes:
        """The file of that name."""
        return (self.root / name).read_bytes()


def _stems(row: dict[str, Any], where: str) -> list[str]:
    key, url = row.get("id"), row.get("url")
    if key is None and url is None:
        raise ValueError(f"{where} has neither id nor url; it has {', '.join(row)}")
    return [str(value) for value in (key, url and PurePosixPath(str(url).partition("?")[0]).stem) if value is not None]
