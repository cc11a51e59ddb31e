"""`layout: tables`: Parquet or Arrow files with the pictures inside, as Hugging Face's datasets are stored."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sana_lab.data import arrow
from sana_lab.data.columns import IMAGE_COLUMNS
from sana_lab.data.layouts import Layout, Place, Record, splits_of, tables_below
from sana_lab.data.layouts.rows import described
from sana_lab.data.tables import column


class Tables(Layout):
    """Files of `Dataset.save_to_disk` (.arrow), or of a dataset on the hub (.parquet), below the root. Where files or
    folders are called after several splits (train-00000-of-00002.parquet, test/), that is the split of their rows."""

    def __init__(
        self,
        root: Path,
        /,
        caption: str | None = None,  # caption of pictures without one, "" for none; null leaves them out
    ) -> None:
        super().__init__(root)
        self.caption = caption
        self.files = tables_below(root)
        self._groups = arrow.Groups(_is_picture)
        if not self.files:
            raise ValueError(f"layout 'tables': there is no .parquet or .arrow below {str(root)!r}")

    def records(self) -> Iterator[Record]:
        """The rows of each file in order."""
        for number, (name, split) in enumerate(zip(self.files, splits_of(self.files), strict=True)):
            try:
                yield from self._rows(number, split)
            except arrow.UnreadableTable as error:
                self.damaged[name] = str(error)

    def read(self, name: str, place: Place) -> bytes:
        """The bytes in a row."""
        value = _picture(self._groups.row(self.root / self.files[place.file], place.offset))
        if value is None:
            raise ValueError(f"{name} holds no picture")
        return value

    def _rows(self, number: int, split: str) -> Iterator[Record]:
        path = self.root / self.files[number]
        label = path.name if self.files[number] == "." else self.files[number]
        for at, given in enumerate(arrow.Table(path).rows()):
            row, name = {column(k): v for k, v in given.items()}, f"{label}:{at + 1}"
            if not any(row.get(c) is not None for c in IMAGE_COLUMNS):
                if at == 0:
                    raise ValueError(
                        f"{path} has no column with pictures; it has {', '.join(given)}, expected one of "
                        f"{', '.join(IMAGE_COLUMNS)}"
                    )
                self.skipped[name] = "no picture"
                continue
            captions, scores, group, own = described(row, name)
            if not captions and self.caption is None:
                self.skipped[name] = "no caption"
                continue
            texts, place = captions or (self.caption or "",), Place(number, at)
            yield Record(name, texts, place, scores, group, own or split, _picture(given))


def _is_picture(name: str) -> bool:
    return column(name) in IMAGE_COLUMNS


def _picture(row: dict[str, Any]) -> bytes | None:
    values = (value for key, value in row.items() if _is_picture(key))
    values = (value.get("bytes") if isinstance(value, dict) else value for value in values)
    return next((value for value in values if isinstance(value, bytes)), None)
