"""The index of a set of pictures on the disk: names, captions, sizes, groups and places, written once."""

import hashlib
import itertools
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock
from rich.console import Console
from rich.progress import Progress, TextColumn

from sana_lab.data import disk_columns, splits
from sana_lab.data.files import listing
from sana_lab.data.images import Blob, UnreadableError, quiet, upright_dimensions
from sana_lab.data.layouts import Layout, Record

COLUMNS = {
    **{"name": "u1", "name_end": "i8", "caption": "u1", "caption_end": "i8", "row_captions_end": "i8"},
    **{"score": "f4", "share": "f8", "split": "u1", "height": "i4", "width": "i4"},
    **{"file": "i4", "offset": "i8", "length": "i8"},
}
"""Column -> type. A row's captions end at `row_captions_end`; their texts and scores are columns of captions."""

VERSION = 2
"""Part of the key of an index, so that those which an earlier version made of the same files are made again."""

MANY = 100_000
"""Pictures from which on a later opening compares `Layout.times`, not each file."""

AT_ONCE = 4096
"""Rows that are written at a time."""

AHEAD = 64
"""Pictures that are in memory at a time."""

HEAD = 4096
"""Bytes of each picture that enter the digest."""


class Header(NamedTuple):
    """What the head of a picture's file says."""

    height: int
    width: int
    digest: bytes


Headed = tuple[Record, Header | str]
"""A record, and the header of its picture or why it cannot be read."""


def build(layout: Layout, folder: Path, unreadable: float) -> disk_columns.Table:
    """The index in `folder`, written unless it is complete; several processes that begin at once write it once.

    Pictures that cannot be read are named, skipped and counted. ValueError if they are more than the share
    `unreadable`, or none is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not disk_columns.is_table(folder):
            _write(layout, folder)
    table = disk_columns.Table(folder)
    check_share(table, unreadable)
    return table


def check_share(table: disk_columns.Table, unreadable: float) -> None:
    """Warn of pictures that are left out. ValueError if they are more than the share `unreadable` of all, or all, or
    if more than that share of the files of many pictures is damaged: how many those held is unknown."""
    left_out, rows = table.meta["skipped"], table.meta["rows"]
    if unused := table.meta.get("unused"):
        print(f"data 'pictures': left out {unused}: {table.meta['unused_examples']}", file=sys.stderr)
    if not left_out:
        return
    damaged, files = table.meta.get("damaged", 0), table.meta.get("files", 0)
    if damaged > unreadable * files:
        raise ValueError(
            f"data 'pictures': {damaged} of {files} files cannot be read to their end: {table.meta['broken']}; at most "
            f"a share `unreadable` of {unreadable:g} may be"
        )
    message = f"{left_out} of {left_out + rows} pictures cannot be used: {table.meta['examples']}"
    if not rows or left_out > unreadable * (left_out + rows):
        raise ValueError(f"data 'pictures': {message}; at most a share `unreadable` of {unreadable:g} may be left out")
    print(f"data 'pictures': {message}; all are in {table.folder / 'skipped.txt'}", file=sys.stderr)


def _write(layout: Layout, folder: Path) -> None:
    digest, skipped, rows, graded, grouped = hashlib.sha256(), layout.skipped, 0, False, False
    bar = Progress(TextColumn("indexed {task.completed:,} pictures"), console=Console(stderr=True), transient=True)
    with disk_columns.Writer(folder, COLUMNS) as writer, bar, quiet(), ThreadPoolExecutor(8) as pool:
        task = bar.add_task("index", total=None)
        ends = dict.fromkeys(("name_end", "caption_end", "row_captions_end"), 0)
        for group in _grouped(_with_headers(layout, pool)):
            skipped |= {r.name: h for r, h in group if isinstance(h, str)}
            good = [(r, h) for r, h in group if isinstance(h, Header)]
            _append(writer, good, ends)
            for record, header in good:
                digest.update(repr((record[:2], record[3:6], header)).encode())
            rows += len(good)
            graded, grouped = graded or any(r.scores for r, _ in group), grouped or any(r.group for r, _ in group)
            bar.advance(task, len(group))
        skipped |= layout.damaged
        left_out = {**skipped, **layout.unused}
        (folder / "skipped.txt").write_text("".join(f"{name}: {why}\n" for name, why in left_out.items()), "utf-8")
        examples = {"skipped": len(skipped), "examples": listing(skipped)}
        if layout.unused:
            examples |= {"unused": len(layout.unused), "unused_examples": listing(layout.unused)}
        facts = {"rows": rows, "digest": digest.hexdigest(), "scores": graded, "groups": grouped}
        if layout.damaged:
            facts |= {"damaged": len(layout.damaged), "files": len(layout.files), "broken": listing(layout.damaged)}
        writer.finish({**facts, **examples, "root": str(layout.root.absolute())})


def _grouped(records: Iterator[Headed]) -> Iterable[tuple[Headed, ...]]:
    while group := tuple(itertools.islice(records, AT_ONCE)):
        yield group


def _with_headers(layout: Layout, pool: Executor) -> Iterator[Headed]:
    """Each record, without its content, and what its picture's header says."""
    waiting: deque[tuple[Record, Future[Header | str]]] = deque()
    for record in layout.records():
        waiting.append((record._replace(content=None), pool.submit(_header, layout, record)))
        if len(waiting) == AHEAD:
            bare, header = waiting.popleft()
            yield bare, header.result()
    for bare, header in waiting:
        yield bare, header.result()


def _header(layout: Layout, record: Record) -> Header | str:
    """What a picture's header says, or why it cannot be read."""
    try:
        content = layout.read(record.name, record.place) if record.content is None else record.content
        size = upright_dimensions(Blob(content))
    except (UnreadableError, OSError, ValueError) as error:
        return str(error)
    return Header(*size, hashlib.sha256(len(content).to_bytes(8) + content[:HEAD] + content[-HEAD:]).digest())


def _append(writer: disk_columns.Writer, rows: list[tuple[Record, Header]], ends: dict[str, int]) -> None:
    records = [record for record, _ in rows]
    captions = [caption for record in records for caption in record.captions]
    scores = [score for r in records for score in (r.scores or (np.nan,) * len(r.captions))]
    for name, texts in (("name", [r.name for r in records]), ("caption", captions)):
        encoded = [text.encode() for text in texts]
        writer.extend(name, b"".join(encoded))
        _close(writer, f"{name}_end", [len(text) for text in encoded], ends)
    _close(writer, "row_captions_end", [len(r.captions) for r in records], ends)
    writer.extend("score", scores)
    writer.extend("share", splits.shares(r.group or r.name for r in records))
    writer.extend("split", splits.codes(records))
    writer.extend("height", [h.height for _, h in rows])
    writer.extend("width", [h.width for _, h in rows])
    for field in ("file", "offset", "length"):
        writer.extend(field, [getattr(r.place, field) for r in records])


def _close(writer: disk_columns.Writer, name: str, lengths: list[int], ends: dict[str, int]) -> None:
    """Append where spans of these lengths end."""
    closed = ends[name] + np.cumsum(lengths, dtype=np.int64)
    writer.extend(name, closed)
    ends[name] = int(closed[-1]) if len(closed) else ends[name]
