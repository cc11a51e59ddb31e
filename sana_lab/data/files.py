"""The files of a folder of images: pictures, caption files, and what is left out with the reason."""

import os
import re
import unicodedata
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path, PurePath

from sana_lab.config import text_files
from sana_lab.data import image_formats

NOT_SNIFFED = (".txt", ".json", ".jsonl", ".csv", ".tsv", ".yaml", ".yml", ".md", ".py", ".npz", ".safetensors")
"""Endings of files that no picture is looked for in."""


class Files:
    """All files below a folder, linked folders included, hidden ones not; each folder is read once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.names: list[str] = []  # relative to the root, with forward slashes
        self.skipped: dict[str, str] = {}  # files and folders that cannot be used -> reason
        self.folders: dict[str, list[int]] = {}  # absolute path -> times of change, before it was read
        for name in sorted(self._walk()):
            if text_files.is_unicode(name):
                self.names.append(name)
            else:
                self.skipped[name] = "its name is not UTF-8; rename it"

    @cached_property
    def pictures(self) -> list[str]:
        """Names of the images: by ending, and files without one by content. The rest of the images is in `skipped`."""
        return [name for name in self.names if self._is_picture(name)]

    def caption_file(self, picture: str) -> Path | None:
        """`a.txt` or `a.jpg.txt` of `a.jpg`, in any case and Unicode normalisation."""
        stems = (str(PurePath(picture).with_suffix("")), picture)
        keys = [key(f"{stem}.txt") for stem in stems]
        name = next((self._by_key[k][0] for k in keys if k in self._by_key), None)
        return None if name is None else self.root / name

    def find(self, name: str) -> str | None:
        """The file that a table means: the name itself, or the one that differs by slashes, case or normalisation."""
        for spelling in (name, name.replace("\\", "/")):
            path = self._inside(spelling)
            if path is not None and (path in self._set or _is_file(self.root / path)):
                return path
        path = self._inside(name.replace("\\", "/"))
        same = self._by_key.get(key(path), []) if path is not None else []
        return same[0] if len(same) == 1 else None

    def _inside(self, name: str) -> str | None:
        """A path relative to the root; None outside."""
        path = os.path.normpath(name)
        if Path(path).is_absolute():
            roots = (os.path.normpath(self.root.absolute()), str(self.root.resolve()))
            path = next((os.path.relpath(path, r) for r in roots if path.startswith(r + os.sep)), "..")
        outside = path == ".." or path.startswith(f"..{os.sep}")
        return None if outside or "\0" in path else path.replace(os.sep, "/")

    @cached_property
    def _set(self) -> frozenset[str]:
        return frozenset(self.names)

    @cached_property
    def _by_key(self) -> dict[str, list[str]]:
        names: dict[str, list[str]] = {}
        for name in self.names:
            names.setdefault(key(name), []).append(name)
        return names

    def _walk(self) -> Iterator[str]:
        """Folders first, then linked folders that are not below the root already."""
        tops, visited = [self.root], set[tuple[int, int]]()
        while tops:
            top = tops.pop(0)
            walk = os.walk(top, onerror=self._unreadable) if self._is_new(top, visited) else ()
            for folder, below, files in walk:
                inside = [Path(folder, b) for b in sorted(below) if not b.startswith(".")]
                tops += [path for path in inside if path.is_symlink()]
                below[:] = [path.name for path in inside if not path.is_symlink() and self._is_new(path, visited)]
                yield from (Path(folder, f).relative_to(self.root).as_posix() for f in files if f[0] != ".")

    def _is_new(self, folder: Path, visited: set[tuple[int, int]]) -> bool:
        """Whether a folder was not visited on another way; remembers it."""
        try:
            stat = folder.stat()
        except OSError:
            return True  # os.walk reports it
        place = (stat.st_dev, stat.st_ino)
        new = place not in visited
        if new:
            visited.add(place)
            self.folders[str(folder.absolute())] = _times(stat)
        return new

    def _unreadable(self, error: OSError) -> None:
        self.skipped[os.path.relpath(error.filename, self.root)] = f"a folder that cannot be read: {error.strerror}"

    def _is_picture(self, name: str) -> bool:
        ending = PurePath(name).suffix.lower()
        if ending in NOT_SNIFFED:
            return False
        reason = self._reason(self.root / name, ending)
        if reason:
            self.skipped[name] = reason
        return reason == ""

    def _reason(self, path: Path, ending: str) -> str | None:
        """Why a picture is left out, "" where it is not; None for another kind of file."""
        if ending not in image_formats.endings():
            if ending in image_formats.UNREADABLE_ENDINGS:
                return f"Pillow cannot read {ending} files"
            if not image_formats.has_magic(path):
                return None
            return f"a picture whose ending {ending!r} is not that of one; rename it" if ending else ""
        if path.is_file():
            return ""
        return "a link to a file that is missing" if path.is_symlink() else "not a regular file"


def key(name: str) -> str:
    """A name without case and Unicode normalisation, as file systems of other machines compare it."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def is_picture_name(text: str) -> bool:
    """Whether a text ends as the name of an image."""
    return PurePath(re.sub(r"[\"'\s]+$", "", text)).suffix.lower() in image_formats.endings()


def listing(skipped: dict[str, str]) -> str:
    """The first names with their reasons."""
    shown = [f"{short(name)} ({why})" for name, why in list(skipped.items())[:5]]
    return ", ".join(shown) + (", ..." if len(skipped) > 5 else "")


def short(text: str) -> str:
    """A text as a literal of at most 100 characters."""
    return repr(text if len(text) <= 100 else f"{text[:97]}...")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file can have
        return False


def times(path: Path | str) -> list[int]:
    """Times of change of a file or folder, of content and of status, in nanoseconds; none if it is missing.

    Those of a folder change where a file in it is added, removed, renamed or replaced, not where one is overwritten.
    """
    try:
        return _times(Path(path).stat())
    except OSError:
        return []


def _times(stat: os.stat_result) -> list[int]:
    return [stat.st_mtime_ns, stat.st_ctime_ns]
