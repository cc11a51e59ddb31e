"""The images of a folder with their captions: from a manifest (.jsonl, .csv, .parquet) or .txt files beside them."""

import difflib
import math
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sana_lab.config import text_files
from sana_lab.data import caption_lists, columns, tables
from sana_lab.data.columns import FILE_COLUMNS, MANIFESTS, TABLES, TEXT_COLUMNS
from sana_lab.data.disk_groups import DiskGroups
from sana_lab.data.files import Files, is_picture_name, listing, short


class Entry(NamedTuple):
    """One image: its path relative to the root, with forward slashes, and at least one caption."""

    name: str
    captions: tuple[str, ...]
    scores: tuple[float, ...] = ()  # of the captions, NaN where missing; () without any
    group: str = ""  # images of one group are all trained on, or all held out
    split: str = ""  # train or val; "" lets the data set choose

    def __repr__(self) -> str:
        """With the columns that a manifest has: part of the digest of a folder."""
        more = [f"{key}={getattr(self, key)!r}" for key in self._fields[2:] if getattr(self, key)]
        return f"Entry({', '.join([f'name={self.name!r}', f'captions={self.captions!r}', *more])})"


class Contents(NamedTuple):
    """What a folder holds."""

    entries: list[Entry]  # sorted by name
    skipped: dict[str, str]  # image that is left out -> reason
    dropped: list[str]  # captions that are left out, as FILE:LINE and reason
    unlisted: frozenset[str] = frozenset()  # images of `skipped` that a manifest does not name


class _Caption(NamedTuple):
    """A caption and where it is written."""

    text: str
    where: str  # FILE:LINE
    score: float = math.nan


class _Row(NamedTuple):
    """What a row of a manifest says of an image; plain values."""

    line: int
    texts: list[str]
    scores: list[float]  # of the texts
    facts: list[str]


_Image = tuple[str, list[_Caption], columns.Facts]
"""Its name, all its captions, group and split."""


def entries(root: Path, manifest: str | None = None, default: str | None = None) -> list[Entry]:
    """The entries of `contents`, with a warning that names and counts what is left out."""
    listed = contents(root, manifest, default)
    report(listed)
    return listed.entries


def contents(root: Path, manifest: str | None = None, default: str | None = None) -> Contents:
    """The images of a folder with their captions, as of `Listing`."""
    images = Listing(root, manifest, default)
    return Contents(list(images), images.skipped, images.dropped, images.unlisted)


class Listing:
    """The images of a folder with their captions, sorted by name; what a manifest says of them stays on the disk.

    A manifest (the given one, or one of MANIFESTS in the root) lists the images; without one, all below the root count,
    and each line of `a.txt` is a caption of `a.jpg`. `default` is the caption of images without one. A caption that is
    no Unicode is left out, and so is an image that has no other. ValueError for no folder, no image, a manifest that is
    absent or broken or names absent files, or a missing caption.
    """

    def __init__(self, root: Path, manifest: str | None = None, default: str | None = None) -> None:
        if not root.is_dir():
            raise ValueError(f"data 'folder': root {str(root)!r} is {_no_folder(root)}")
        self.default = default
        self._files, self._table = Files(root), manifest_of(root, manifest)
        self.unlisted: frozenset[str] = frozenset()  # images of `skipped` that a manifest does not name
        if self._table is None:
            self._groups: Any = _text_files(self._files)
        else:
            self._groups, self.unlisted = _listed(self._files, self._table)
        self.skipped = self._files.skipped  # image that is left out -> reason
        self.dropped: list[str] = []  # captions that are left out, as FILE:LINE and reason
        self._check()

    def __iter__(self) -> Iterator[Entry]:
        for name, captions, facts in self._images():
            if name not in self.skipped:
                yield _entry(name, _clean(captions), facts, self.default or "")

    def _check(self) -> None:
        """Find what is left out. ValueError for images without a caption, and rows of an image that differ."""
        bare, total = list[str](), 0
        for name, captions, _ in self._images():
            total += 1
            broken = _broken(captions)
            self.dropped += broken
            if _clean(captions):
                continue
            if broken:
                self.skipped.setdefault(name, broken[0])
            elif name not in self.skipped:
                bare.append(name)
        if bare and self.default is None:
            raise ValueError(_no_caption(self._files, bare, total, self._table))

    def _images(self) -> Iterator[_Image]:
        if self._table is None:
            return ((name, captions, columns.NO_FACTS) for name, captions in self._groups)
        return (self._of_rows(name, [_Row(*row) for row in rows]) for name, rows in self._groups)

    def _of_rows(self, name: str, rows: list[_Row]) -> _Image:
        """ValueError for rows of an image that differ."""
        for row in rows:
            if row.facts != rows[0].facts:
                where = f"{self._table}:{row.line}"
                raise ValueError(f"data 'folder': {where} puts {short(name)} into another split or group than before")
        captions = [
            _Caption(text, f"{self._table}:{row.line}", score)
            for row in rows
            for text, score in zip(row.texts, row.scores, strict=True)
        ]
        return name, captions, columns.Facts(*rows[0].facts)


def _entry(name: str, texts: dict[str, float], facts: columns.Facts, default: str) -> Entry:
    scores = tuple(texts.values())
    scored = () if all(map(math.isnan, scores)) else scores
    return Entry(name, tuple(texts) or (default,), scored, *facts)


def report(contents: Contents) -> None:
    """Warn of what is left out, by name and number."""
    total = len(contents.entries) + len(contents.skipped)
    if contents.skipped:
        message = f"data 'folder': skipped {len(contents.skipped)} of {total} files: {listing(contents.skipped)}"
        warnings.warn(message, stacklevel=2)
    if contents.dropped:
        shown = ", ".join(contents.dropped[:5]) + (", ..." if len(contents.dropped) > 5 else "")
        warnings.warn(f"data 'folder': left out {len(contents.dropped)} captions: {shown}", stacklevel=2)


def manifest_of(root: Path, given: str | None) -> Path | None:
    """The manifest that lists the images of a folder: the given one, else one of MANIFESTS in it. ValueError if it is
    absent, or there are several."""
    if given is None:
        present = [p for p in sorted(root.iterdir()) if p.name.lower() in MANIFESTS and p.is_file()]
        if len(present) > 1:
            raise ValueError(f"data 'folder': there are {' and '.join(map(str, present))}; choose one with `manifest`")
        return present[0] if present else None
    path = next((p for p in (Path(given), root / given) if p.is_file()), None)
    if path is None:
        names = (p.name for p in root.iterdir() if p.suffix.lower() in TABLES)
        raise ValueError(
            f"data 'folder': manifest {given!r} is no file, neither here nor in {str(root)!r}{near(given, names)}"
        )
    return path


def _text_files(files: Files) -> list[tuple[str, list[_Caption]]]:
    if not files.pictures:
        other = [p.name for p in sorted(files.root.iterdir())[:3]]
        left_out = f"; left out: {listing(files.skipped)}" if files.skipped else ""
        raise ValueError(
            f"data 'folder': {str(files.root)!r} holds no image; expected files that end in .jpg, .png or as another "
            f"format of Pillow, at any depth; it holds {', '.join(map(repr, other)) or 'nothing'}{left_out}"
        )
    return [(name, _lines(files.caption_file(name))) for name in files.pictures]


def _lines(path: Path | None) -> list[_Caption]:
    if path is None or not path.is_file():
        return []
    lines = enumerate(_read(text_files.read, path, surrogates=True).split("\n"), 1)
    return [_Caption(line, f"{path}:{number}") for number, line in lines]


def _read(reader: Any, *arguments: Any, **options: Any) -> Any:
    """What a reader makes of a file or a row. ValueError in the words of this data set."""
    try:
        return reader(*arguments, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"data 'folder': {error}") from error


def _listed(files: Files, table: Path) -> tuple[DiskGroups, frozenset[str]]:
    """(rows of each image, images that no row names). ValueError for names of files that are missing."""
    missing: dict[str, int] = {}  # name -> line
    dangling: dict[str, str] = {}  # name -> reason
    groups = DiskGroups(_named_rows(files, table, missing, dangling))
    if missing:
        raise ValueError(_missing(files, table, missing, len(groups) + len(missing)))
    if not groups:
        left_out = f" that can be used: {listing(dangling)}" if dangling else ""
        raise ValueError(f"data 'folder': manifest {str(table)!r} has no rows{left_out}")
    unlisted = frozenset(_without(files.pictures, (name for name, _ in groups)))
    if files.skipped:
        for name, _ in groups:
            files.skipped.pop(name, None)  # a table may name a picture of any ending
    files.skipped |= dict.fromkeys(sorted(unlisted), f"no row in {table.name}") | dangling
    return groups, unlisted


def _named_rows(
    files: Files, table: Path, missing: dict[str, int], dangling: dict[str, str]
) -> Iterator[tuple[str, _Row]]:
    """(image, row) of each row; names without a file are in `missing` and `dangling`."""
    for line, row in _rows(table):
        where = f"{table}:{line}"
        if _is_text(table):
            _check_quotes(row, where)
        given = _file(row, where)
        texts = _texts(row, where, table)
        scores = _read(columns.scores, row, len(texts), where)
        name = files.find(given)
        if name is None:
            missing.setdefault(given, line)
        elif not (files.root / name).is_file():
            dangling[name] = f"{where}: a link to a file that is missing"
        else:
            yield name, _Row(line, texts, scores, list(_read(columns.facts, row, where)))


def _rows(table: Path) -> Iterator[tables.Row]:
    """The rows of a manifest. ValueError in the words of this data set."""
    rows = _read(tables.stream, table, (*FILE_COLUMNS, *TEXT_COLUMNS))
    while (row := _read(next, rows, None)) is not None:
        yield row


def _without(names: Iterable[str], others: Iterable[str]) -> Iterator[str]:
    """The names that are not among the others; both are sorted."""
    others = iter(others)
    other = next(others, None)
    for name in names:
        while other is not None and other < name:
            other = next(others, None)
        if name != other:
            yield name


def _is_text(table: Path) -> bool:
    """Whether a table holds text alone, so that lists are written in it as text."""
    return table.suffix.lower() in (".csv", ".tsv")


def _check_quotes(row: dict[str, Any], where: str) -> None:
    """ValueError if a field over several lines holds the name of an image as a row would."""
    for value in row.values():
        parts = re.split(r"[,;\t|\n]", value) if isinstance(value, str) and "\n" in value else []
        name = next((part.strip(' "') for part in parts if is_picture_name(part)), None)
        if name is not None:
            raise ValueError(
                f"data 'folder': {where} has a field in quotes that goes on over several lines and holds "
                f"{short(name)}, as if the quote of one row ended in another; expected a closing quote in each row"
            )


def _missing(files: Files, table: Path, missing: dict[str, int], total: int) -> str:
    name, line = next(iter(missing.items()))
    return (
        f"data 'folder': {table} names {len(missing)} of {total} files that are not below {str(files.root)!r}: "
        f"{_some(list(missing))}, first in line {line}{near(name, files.pictures)}"
    )


def _broken(captions: list[_Caption]) -> list[str]:
    """The captions that are no Unicode, each with its place."""
    kind = "holds half of a surrogate pair, which is not valid Unicode"
    return [f"{c.where}: {short(c.text)} {kind}" for c in captions if not text_files.is_unicode(c.text)]


def _file(row: dict[str, Any], where: str) -> str:
    value = next((row[c] for c in FILE_COLUMNS if row.get(c)), None)
    if not isinstance(value, str):
        header = "; the first line must name the columns" if any(map(is_picture_name, row)) else ""
        raise ValueError(
            f"data 'folder': {where} names no file; it has {_quoted(row)}, "
            f"expected one of {_quoted(FILE_COLUMNS)}{header}"
        )
    return value


def _texts(row: dict[str, Any], where: str, table: Path) -> list[str]:
    names = [c for c in TEXT_COLUMNS if c in row]
    if not names:
        raise ValueError(
            f"data 'folder': {where} has no caption column; it has {_quoted(row)}, "
            f"expected one of {_quoted(TEXT_COLUMNS)}"
        )
    try:
        texts = [text for c in names for text in _several(row[c], _is_text(table))]
    except ValueError as error:
        raise ValueError(f"data 'folder': {where}: {error}") from error
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"data 'folder': {where} has captions {texts!r:.200}, expected text or a list of texts")
    return texts


def _several(value: Any, bare: bool) -> list[Any]:
    """The texts of a field as a list: a list, a list that was written as text, one text, or none."""
    if isinstance(value, list):
        return [text for item in value for text in (_several(item, bare) if bare else [item])]
    if isinstance(value, str):
        return caption_lists.parse(value, bare=bare)
    return [] if value is None else [value]


def _clean(captions: Iterable[_Caption]) -> dict[str, float]:
    """Texts stripped, with their scores, without blank and repeated ones and those that are no Unicode."""
    texts: dict[str, float] = {}
    for caption in captions:
        text = caption.text.strip().strip("\ufeff\u200b").strip()
        if text and text_files.is_unicode(text):
            texts.setdefault(text, caption.score)
    return texts


def _no_folder(root: Path) -> str:
    if root.exists():
        return "a file, expected a folder"
    folders = [p.name for p in root.parent.iterdir() if p.is_dir()] if root.parent.is_dir() else []
    return "missing, expected a folder of images" + near(root.name, folders)


def _no_caption(files: Files, bare: list[str], total: int, table: Path | None) -> str:
    where = (
        f"a caption in {table}"
        if table
        else f"captions in {Path(bare[0]).with_suffix('.txt').as_posix()!r}, one a line"
    )
    tables = [p.name for p in files.root.iterdir() if p.suffix.lower() in TABLES] if table is None else []
    hint = f"; is {tables[0]!r} the manifest? then say `manifest: {tables[0]}`" if tables else ""
    return (
        f"data 'folder': {len(bare)} of {total} images have no caption: {_some(bare)}; expected {where}, "
        f'or one for all such images with `caption: "..."` (`caption: ""` trains without text){hint}'
    )


def near(name: str, names: Iterable[str]) -> str:
    """A did-you-mean clause with the same file name in another folder or a similar name; empty if none."""
    names = list(names)
    same = [n for n in names if Path(n).name == Path(name).name]
    close = same or difflib.get_close_matches(name[:200], names[:10_000], 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _some(names: list[str]) -> str:
    return ", ".join(map(short, names[:3])) + (", ..." if len(names) > 3 else "")


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(short(str(name)) for name in names)
