"""Atomic writes: to a temporary file beside the target, flushed to disk, then renamed; no partial files remain."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

FULL = (
    "no space left",
    "database or disk is full",
    "os error 28",
    "disk quota",
    "os error 122",
    "file too large",
    "os error 27",
    "write failed",
)
"""Phrases of libraries that hide the system's error of a full disk in one of their own."""

WRITER_FAILED = ("pytorchstreamwriter failed", "unexpected pos", "failed writing file", "i/o error")
"""Phrases of libraries whose writing failed without a reason."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Context with a temporary path to write to, which atomically replaces `path` at the end.

    If the block fails, the temporary file is removed and `path` is unchanged. One-line OSError with path and free
    space if the disk is full, including when a library wraps that error. A link stays, and its target is replaced; to
    what is no file, such as /dev/stdout, the block writes directly.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file() and not path.is_dir():
        yield path
        return
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".{target.name}.{os.getpid()}-{uuid4().hex[:8]}.partial")
    with explaining_full_disk(path):
        try:
            yield partial
            synchronise(partial)
            partial.replace(target)
            synchronise(target.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, which must be new or empty, to write to; afterwards it takes that place whole.

    Where the block fails nothing is left. OSError of one line where the disk is full.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}-{uuid4().hex[:8]}.partial")
    with explaining_full_disk(folder):
        try:
            partial.mkdir()
            yield partial
            for path in partial.rglob("*"):
                synchronise(path)
            if folder.is_dir():
                folder.rmdir()
            partial.replace(folder)
            synchronise(folder.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def explaining_full_disk(path: Path) -> Iterator[None]:
    """DiskFull "PATH: the disk has no room ..." in place of any error of a write that a disk refused.

    Blocks may be nested: the innermost names the file.
    """
    try:
        yield
    except Exception as error:
        if not is_full_disk(error) or isinstance(error, DiskFull):
            raise
        raise DiskFull(errno.ENOSPC, f"the disk has no room for it: {free_space(path)}", str(path)) from error


class DiskFull(OSError):
    """A disk, quota or file-size limit is full: the file, and the room that is left."""


def is_full_disk(error: BaseException) -> bool:
    """Whether an error, or one of its causes, is a full disk, quota or file-size limit."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    text = str(error).lower()
    if not isinstance(error, ValueError) and any(phrase in text for phrase in (*FULL, *WRITER_FAILED)):
        return True
    earlier = error.__cause__ or error.__context__
    return earlier is not None and is_full_disk(earlier)


def free_space(path: Path) -> str:
    """The room on the disk of a path, in words."""
    folder = next(p for p in path.absolute().parents if p.is_dir())
    return f"{shutil.disk_usage(folder).free / 2**20:,.1f} MiB are free in {folder}; free some and run it again"


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, atomically."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def synchronise(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
