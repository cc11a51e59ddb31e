"""`layout: tars`: tars in the layout of webdataset and img2dataset, each picture beside its .txt or .json."""

import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePath

from sana_lab.data import image_formats
from sana_lab.data.layouts import Layout, Place, Record, below, splits_of
from sana_lab.data.layouts.rows import Description, described
from sana_lab.data.tables import column

END = bytes(512)
"""Block that ends an archive."""

Members = dict[str, tuple[tarfile.TarInfo, bytes]]
"""Ending -> member and, of a description, its content."""


class Tars(Layout):
    """Uncompressed tars below the root. Members that follow each other and have the same name up to the first dot of
    the last part are one sample: a picture; captions in .txt, one a line, or .json, with columns as a manifest's.
    Where tars or folders are called after several splits (train/, val-00000.tar), their samples have that split."""

    def __init__(
        self,
        root: Path,
        /,
        caption: str | None = None,  # caption of pictures without one, "" for none; null leaves them out
    ) -> None:
        super().__init__(root)
        self.caption = caption
        self.files = below(root, [".tar"])
        if not self.files:
            raise ValueError(f"layout 'tars': there is no .tar below {str(root)!r}{_compressed(root)}")

    def records(self) -> Iterator[Record]:
        """The samples of each tar in order; a truncated tar gives those before its end."""
        for number, (name, split) in enumerate(zip(self.files, splits_of(self.files), strict=True)):
            try:
                for record in self._samples(number, self.root / name):
                    yield record._replace(split=record.split or split)
            except (tarfile.TarError, OSError, EOFError) as error:
                self.damaged[name] = f"cannot be read to its end: {error}"

    def read(self, name: str, place: Place) -> bytes:
        """A part of a tar."""
        path = self.root / self.files[place.file]
        with path.open("rb") as file:
            content = os.pread(file.fileno(), place.length, place.offset)
        if len(content) < place.length:
            raise ValueError(f"{path} ends within {name}")
        return content

    def _samples(self, number: int, path: Path) -> Iterator[Record]:
        stem, members = "", Members()
        label = self.files[number] if self.files[number] != "." else path.name
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                vars(tar)["members"] = []  # tarfile keeps all
                folder, _, last = info.name.rpartition("/")
                if not info.isfile() or last.startswith("."):
                    continue
                key, ending = f"{folder}/{last.partition('.')[0]}".lstrip("/"), PurePath(last).suffix.lower()
                if key != stem:
                    yield from self._record(f"{label}/{stem}", number, members)
                    stem, members = key, {}
                file = tar.extractfile(info) if ending in (".txt", ".json") else None
                members[ending] = (info, file.read() if file else b"")
            end = tar.offset
        yield from self._record(f"{label}/{stem}", number, members)
        with path.open("rb") as file:
            if os.pread(file.fileno(), 512, max(0, end - 512)) != END and os.pread(file.fileno(), 512, end) != END:
                raise tarfile.ReadError("it is truncated")

    def _record(self, name: str, number: int, members: Members) -> Iterator[Record]:
        picture = next((member for ending, (member, _) in members.items() if ending in image_formats.endings()), None)
        if picture is None:
            if members:
                self.skipped[name] = f"no picture among {', '.join(members)}"
            return
        try:
            captions, scores, group, split = self._described(name, members)
        except ValueError as error:
            self.skipped[name] = str(error)
            return
        if not captions and self.caption is None:
            self.skipped[name] = "no caption"
            return
        place = Place(number, picture.offset_data, picture.size)
        yield Record(name, captions or (self.caption or "",), place, scores, group, split)

    def _described(self, name: str, members: Members) -> Description:
        row = {}
        if ".json" in members:
            row = json.loads(members[".json"][1])
            if not isinstance(row, dict):
                raise ValueError(f"{name}.json is a {type(row).__name__}, expected an object")
        row = {column(key): value for key, value in row.items()}
        if ".txt" in members:
            lines = members[".txt"][1].decode("utf-8").split("\n")
            row.setdefault("caption", [line for line in lines if line.strip()])
        return described(row, name)


def _compressed(root: Path) -> str:
    names = below(root, [".tar.gz", ".tgz", ".tar.zst", ".tar.xz"]) if root.is_dir() else []
    return f"; {names[0]!r} is compressed, which has no random access: decompress it" if names else ""
