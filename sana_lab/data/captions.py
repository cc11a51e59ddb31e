"""The images of a folder with their captions: from a manifest (.jsonl, .csv) or from .txt files beside them."""

import contextlib
import csv
import difflib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sana_lab.data.images import SUFFIXES

FILE_COLUMNS = ("file_name", "image", "file", "filename", "path", "image_path")
TEXT_COLUMNS = ("caption", "captions", "prompt", "prompts", "text", "texts")
MANIFESTS = tuple(stem + suffix for stem in ("captions", "metadata", "manifest") for suffix in (".jsonl", ".csv"))


class Entry(NamedTuple):
    """One image: its path relative to the root, with forward slashes, and at least one caption."""

    name: str
    captions: tuple[str, ...]


def entries(root: Path, manifest: str | None = None, default: str | None = None) -> list[Entry]:
    """The images of a folder with their captions, sorted by name.

    A manifest (the given one, or one of MANIFESTS in the root) lists the images; without one, all below the root count,
    and each line of `a.txt` is a caption of `a.jpg`. `default` is the caption of images without one. ValueError for no
    folder, no image, a manifest that is absent or broken or names absent files, or a missing caption.
    """
    if not root.is_dir():
        raise ValueError(f"data 'folder': root {str(root)!r} is {_no_folder(root)}")
    table = _manifest(root, manifest)
    captions = _text_files(root) if table is None else _listed(root, table)
    bare = [name for name, texts in captions.items() if not texts]
    if bare and default is None:
        raise ValueError(_no_caption(root, bare, len(captions), table))
    return [Entry(name, tuple(texts) or (default or "",)) for name, texts in sorted(captions.items())]


def pictures(root: Path) -> list[str]:
    """Names of all images below the root, by suffix, sorted; without hidden files and folders."""
    names = []
    for folder, below, files in os.walk(root):
        below[:] = [b for b in below if not b.startswith(".")]
        names += [Path(folder, f).relative_to(root).as_posix() for f in files if _is_picture(f)]
    return sorted(names)


def _is_picture(file: str) -> bool:
    return file.lower().endswith(SUFFIXES) and not file.startswith(".")


def _manifest(root: Path, given: str | None) -> Path | None:
    if given is None:
        tables = [root / name for name in MANIFESTS if (root / name).is_file()]
        if len(tables) > 1:
            raise ValueError(f"data 'folder': there are {' and '.join(map(str, tables))}; choose one with `manifest`")
        return tables[0] if tables else None
    path = next((p for p in (Path(given), root / given) if p.is_file()), None)
    if path is None:
        names = (p.name for p in root.iterdir() if p.suffix in (".jsonl", ".csv"))
        raise ValueError(
            f"data 'folder': manifest {given!r} is no file, neither here nor in {str(root)!r}{near(given, names)}"
        )
    return path


def _text_files(root: Path) -> dict[str, list[str]]:
    names = pictures(root)
    if not names:
        other = [p.name for p in sorted(root.iterdir())[:3]]
        raise ValueError(
            f"data 'folder': {str(root)!r} holds no image; expected files that end in {', '.join(SUFFIXES)}, "
            f"at any depth; it holds {', '.join(map(repr, other)) or 'nothing'}"
        )
    return {name: _clean(_lines((root / name).with_suffix(".txt"))) for name in names}


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    try:
        return path.read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"data 'folder': {str(path)!r} is not UTF-8: {error}") from error


def _listed(root: Path, table: Path) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    for line, row in _rows(table):
        name = os.path.normpath(_file(row, f"{table}:{line}")).replace(os.sep, "/")
        captions[name] = _clean(captions.get(name, []) + _texts(row, f"{table}:{line}"))
    if not captions:
        raise ValueError(f"data 'folder': manifest {str(table)!r} has no rows")
    missing = [name for name in captions if not (root / name).is_file()]
    if missing:
        raise ValueError(
            f"data 'folder': {table} names {len(missing)} of {len(captions)} files that are not below {str(root)!r}: "
            f"{_some(missing)}{near(missing[0], pictures(root))}"
        )
    return captions


def _rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and row of each entry. ValueError where the file is not of its kind."""
    readers = {".jsonl": _jsonl, ".csv": _csv}
    if table.suffix.lower() not in readers:
        raise ValueError(
            f"data 'folder': manifest {str(table)!r} is {table.suffix or 'bare'!r}, expected .jsonl or .csv"
        )
    try:
        yield from readers[table.suffix.lower()](table)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"data 'folder': {str(table)!r} is no UTF-8 {table.suffix}: {error}") from error


def _jsonl(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with table.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _object(line, f"{table}:{number}")


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"data 'folder': {where} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"data 'folder': {where} is a {type(row).__name__}, expected an object such as {_EXAMPLE}")
    return row


_EXAMPLE = '{"file_name": "a.jpg", "captions": ["a cat", "a small cat"]}'


def _csv(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with table.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            if None in row:
                raise ValueError(
                    f"data 'folder': {table}:{reader.line_num} has more fields than the header; "
                    'put captions that hold a comma in double quotes: a.jpg,"a cat, asleep"'
                )
            yield reader.line_num, row


def _file(row: dict[str, Any], where: str) -> str:
    value = next((row[c] for c in FILE_COLUMNS if row.get(c)), None)
    if not isinstance(value, str):
        raise ValueError(
            f"data 'folder': {where} names no file; it has {_quoted(row)}, expected one of {_quoted(FILE_COLUMNS)}"
        )
    return value


def _texts(row: dict[str, Any], where: str) -> list[str]:
    columns = [c for c in TEXT_COLUMNS if c in row]
    if not columns:
        raise ValueError(
            f"data 'folder': {where} has no caption column; it has {_quoted(row)}, "
            f"expected one of {_quoted(TEXT_COLUMNS)}"
        )
    texts = [text for c in columns for text in _several(row[c])]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"data 'folder': {where} has captions {texts!r}, expected text or a list of texts")
    return texts


def _several(value: Any) -> list[Any]:
    """The texts of a field as a list: a list, a list that a CSV field holds as JSON, one text, or none."""
    if isinstance(value, str) and value.startswith('["'):
        with contextlib.suppress(json.JSONDecodeError):
            value = json.loads(value)
    if isinstance(value, list):
        return value
    return [] if value is None else [value]


def _clean(texts: Iterable[str]) -> list[str]:
    """Texts stripped, without blank and repeated ones."""
    return list(dict.fromkeys(t.strip() for t in texts if t.strip()))


def _no_folder(root: Path) -> str:
    if root.exists():
        return "a file, expected a folder"
    folders = [p.name for p in root.parent.iterdir() if p.is_dir()] if root.parent.is_dir() else []
    return "missing, expected a folder of images" + near(root.name, folders)


def _no_caption(root: Path, bare: list[str], total: int, table: Path | None) -> str:
    where = (
        f"a caption in {table}"
        if table
        else f"captions in {Path(bare[0]).with_suffix('.txt').as_posix()!r}, one a line"
    )
    tables = [p.name for p in root.iterdir() if p.suffix in (".jsonl", ".csv")] if table is None else []
    hint = f"; is {tables[0]!r} the manifest? then say `manifest: {tables[0]}`" if tables else ""
    return (
        f"data 'folder': {len(bare)} of {total} images have no caption: {_some(bare)}; expected {where}, "
        f'or one for all such images with `caption: "..."` (`caption: ""` trains without text){hint}'
    )


def near(name: str, names: Iterable[str]) -> str:
    """A did-you-mean clause: the same file name in another folder, or a similar name; empty where there is none."""
    names = list(names)
    same = [n for n in names if Path(n).name == Path(name).name]
    close = same or difflib.get_close_matches(name, names[:10_000], 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
