"""Rows of .jsonl, .csv, .tsv and .parquet files as spreadsheets, pandas, R and databases write them, with lines."""

import csv
import io
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from sana_lab.config import text_files
from sana_lab.data import arrow

DELIMITERS = (",", ";", "\t", "|")

Row = tuple[int, dict[str, Any]]
"""(line where it starts, value by column); a column is in lower case with underscores for spaces, `file_name`."""


def rows(path: Path, columns: Collection[str]) -> list[Row]:
    """All rows of `stream`."""
    return list(stream(path, columns))


def stream(path: Path, columns: Collection[str]) -> Iterator[Row]:
    """The rows of a table, one after the other; those of a CSV are in memory together. `columns` are names by which the
    header and so the delimiter is known.

    A CSV may have any of DELIMITERS, quotes doubled or after a backslash, fields over several lines and any line end.
    ValueError with file and line where a row is not of its kind; an unclosed quote is one.
    """
    readers: dict[str, Callable[[Path, Collection[str]], Iterable[Row]]]
    readers = {".jsonl": _jsonl, ".ndjson": _jsonl, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{str(path)!r} is {path.suffix or 'bare'!r}, expected .jsonl, .csv or .parquet")
    return iter(readers[path.suffix.lower()](path, columns))


def column(name: str) -> str:
    """A column's name as it is looked up: 'File Name' is file_name."""
    return re.sub(r"[\s-]+", "_", name.strip()).casefold()


def _jsonl(path: Path, columns: Collection[str]) -> Iterator[Row]:
    lines = enumerate(text_files.lines(path, surrogates=True), 1)
    return ((number, _object(line, f"{path}:{number}")) for number, line in lines if line.strip())


def _parquet(path: Path, columns: Collection[str]) -> Iterator[Row]:
    return ((n, {column(k): v for k, v in row.items()}) for n, row in enumerate(arrow.Table(path).rows(), 1))


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where} is a {type(row).__name__}, expected an object such as {_EXAMPLE}")
    return {column(key): value for key, value in row.items()}


_EXAMPLE = '{"file_name": "a.jpg", "captions": ["a cat", "a small cat"]}'


def _csv(path: Path, columns: Collection[str]) -> list[Row]:
    text = text_files.read(path, surrogates=True)
    first = re.match(r'"?sep=(.)"?(?=\n)', text)  # Excel's own first line
    text = text[first.end() :] if first else text
    delimiter = first[1] if first else max(DELIMITERS, key=lambda d: _fit(text, d, columns))
    try:
        plain = list(_rows(text, delimiter, False, path))
    except ValueError:
        escaped = _escaped(text, delimiter, path)
        if escaped is None:
            raise
        return escaped
    backslashes = any('\\"' in str(value) for _, row in plain for value in row.values())
    return (_escaped(text, delimiter, path) if backslashes else None) or plain


def _escaped(text: str, delimiter: str, path: Path) -> list[Row] | None:
    """The rows if quotes and delimiters are escaped with a backslash; else None."""
    try:
        return list(_rows(text, delimiter, True, path))
    except ValueError:
        return None


def _fit(text: str, delimiter: str, columns: Collection[str]) -> tuple[int, int]:
    """How well a delimiter splits the header: (columns that are known, columns)."""
    try:
        _, header = next(_records("\n".join(text.lstrip("\n").split("\n", 9)[:9]), delimiter, False, ""), (1, []))
    except ValueError:
        return 0, 0
    return len({column(name) for name in header} & set(columns)), len(header)


def _rows(text: str, delimiter: str, escaped: bool, path: Path) -> Iterator[Row]:
    """Rows by the header, the first record that is not empty. ValueError for a record with more or fewer fields."""
    records = [(n, r) for n, r in _records(text, delimiter, escaped, str(path)) if any(f.strip() for f in r)]
    if not records:
        return
    header = [column(name) for name in records.pop(0)[1]]
    if records and all(
        fields[0] == str(i) and len(fields) == len(header) + 1 for i, (_, fields) in enumerate(records, 1)
    ):
        header = ["", *header]  # R's row names have no header
    for line, fields in records:
        while len(fields) > len(header) and not fields[-1].strip():
            fields.pop()
        if len(fields) != len(header):
            raise ValueError(_other_count(f"{path}:{line}", fields, header))
        yield line, _row(header, fields)


def _row(header: list[str], fields: list[str]) -> dict[str, Any]:
    """Values by column; a column that the header has twice holds a list."""
    row: dict[str, Any] = {}
    for name, value in zip(header, fields, strict=True):
        if name:
            row[name] = value if header.count(name) == 1 else [*row.get(name, []), value]
    return row


def _records(text: str, delimiter: str, escaped: bool, where: str) -> Iterator[tuple[int, list[str]]]:
    """(line of its start, fields) of each record that is no blank line. ValueError for a quote that is not closed."""
    if not escaped and (records := _fast(text, delimiter)) is not None:
        yield from records
        return
    d = re.escape(delimiter)
    body = r'[^"\\]*(?:(?:""|\\.)[^"\\]*)*' if escaped else r'[^"]*(?:""[^"]*)*'
    bare = rf"(?:[^{d}\n\\]|\\.)*" if escaped else rf"[^{d}\n]*"
    field = re.compile(rf' *"(?P<quoted>{body})" *(?={d}|\n|\Z)|(?! *")(?P<bare>{bare})', re.DOTALL)
    position, line, start, fields = 0, 1, 1, []
    while position <= len(text):
        match = field.match(text, position)
        if match is None:
            raise ValueError(_broken_quote(text[position:], f"{where}:{line}"))
        fields.append(_unescaped(match, delimiter, escaped))
        line += match[0].count("\n")
        position = match.end() + 1
        if text[match.end() : position] != delimiter:
            if fields != [""]:
                yield start, fields
            line += 1
            start, fields = line, []


def _fast(text: str, delimiter: str) -> list[tuple[int, list[str]]] | None:
    """The same by the standard library; None for what it cannot read, such as a field beyond its limit."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    records, line = [], 1
    try:
        for fields in reader:
            if fields:
                records.append((line, fields))
            line = reader.line_num + 1
    except csv.Error:
        return None
    return records


def _unescaped(match: re.Match[str], delimiter: str, escaped: bool) -> str:
    quoted = match["quoted"]
    value = match["bare"] if quoted is None else quoted.replace('""', '"')
    return re.sub(rf'\\(["\\{re.escape(delimiter)}])', r"\1", value) if escaped else value


def _broken_quote(rest: str, where: str) -> str:
    line = rest.partition("\n")[0].strip()
    shown = line if len(line) <= 60 else f"{line[:57]}..."
    return (
        f"{where}: the double quote of {shown!r} is not closed, or text follows where it closes; "
        'expected "..." around the whole field, and "" for each quote inside'
    )


def _other_count(where: str, fields: list[str], header: list[str]) -> str:
    kind = "more" if len(fields) > len(header) else "fewer"
    return (
        f"{where} has {kind} fields than the header: {len(fields)}, not {len(header)} ({', '.join(header)}); "
        'put captions that hold a comma in double quotes: a.jpg,"a cat, asleep"'
    )
