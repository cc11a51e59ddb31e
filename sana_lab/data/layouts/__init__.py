"""The interface of a layout: how pictures and their captions lie on the disk, as a stream of records."""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

from sana_lab.data import columns


class Place(NamedTuple):
    """Where the bytes of a picture are. A layout gives these numbers their meaning."""

    file: int = 0  # number of the file in `files`
    offset: int = 0  # bytes, or a row
    length: int = 0  # bytes


class Record(NamedTuple):
    """A picture with its captions."""

    name: str  # unique, for messages and for the choice of held-out pictures
    captions: tuple[str, ...]
    place: Place = Place()
    scores: tuple[float, ...] = ()  # of the captions, NaN where missing; () without any
    group: str = ""  # pictures of one group are all trained on, or all held out
    split: str = ""  # train or val; "" leaves the choice to a hash of the group or the name
    content: bytes | None = None  # the file, where it was read with the description


class Layout(ABC):
    """Pictures below `root`. A subclass sets `files` and implements `records` and `read`.

    `records` is read once, to write an index on the disk, and `read` called for records without `content`; afterwards
    `read` is called for each picture by its place, in any order.
    """

    files: list[str]
    """Files that hold the pictures or describe them, relative to `root`."""

    def __init__(self, root: Path, /) -> None:
        self.root = root
        self.skipped: dict[str, str] = {}  # what cannot be used -> reason, after `records`
        self.unused: dict[str, str] = {}  # what is left out by choice and counts as no fault -> reason
        self.damaged: dict[str, str] = {}  # files of many pictures that cannot be read to their end -> reason
        # after `fingerprint`: folders, and files that describe pictures -> `files.times`; while these stay, the content
        # of a large root counts as unchanged. Empty where the fingerprint alone says so
        self.times: dict[str, list[int]] = {}

    @abstractmethod
    def records(self) -> Iterator[Record]:
        """All pictures in a fixed order; what cannot be used is in `skipped` or `damaged`. ValueError for a malformed
        description, with file and line."""

    @abstractmethod
    def read(self, name: str, place: Place) -> bytes:
        """The file of a picture. OSError, ValueError."""

    def fingerprint(self) -> str:
        """SHA-256 of names, lengths and times of change of all files: another one means another index."""
        return fingerprint_of(self.root, self.files)


def fingerprint_of(root: Path, names: Iterable[str]) -> str:
    """SHA-256 of names, lengths and times of change of files."""
    digest = hashlib.sha256()
    for name in names:
        stat = (root / name).stat()
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


_SPLIT_NAME = re.compile(rf"(?:^|[-_. \d])({'|'.join(columns.TRAIN + columns.HELD_OUT)})(?=$|[-_. \d])", re.IGNORECASE)


def splits_of(names: Sequence[str]) -> list[str]:
    """The split that each file, or one of its folders, is called after, as train-00000-of-00002, laion_test_000 or
    val/000; "" of all where they have only one."""
    splits = [_split_of(PurePath(name)) for name in names]
    return splits if len({*splits}) > 1 else [""] * len(splits)


def _split_of(path: PurePath) -> str:
    words = (word for part in (*path.parts[:-1], path.stem) for word in _SPLIT_NAME.findall(part))
    return columns.split(next(words, ""), str(path))


def tables_below(root: Path) -> list[str]:
    """Parquet and Arrow files below a folder, without those in which Hugging Face's datasets keeps what it computed."""
    names = below(root, [".parquet", ".arrow"])
    return [n for n in names if not (PurePath(n).name.startswith("cache-") and n.endswith(".arrow"))]


def below(root: Path, endings: Iterable[str]) -> list[str]:
    """Files of these endings below a folder, or the file itself, relative to it and sorted; hidden ones left out."""
    if root.is_file():
        return ["."]
    names = (p.relative_to(root) for p in root.rglob("*") if p.name.lower().endswith(tuple(endings)) and p.is_file())
    return sorted(name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts))
