"""Archives of emoji drawings and of their names, as `npm pack` writes them; read in place, never unpacked.

The drawings are 64 x 64 RGBA PNG files, named by code points. Their licences: Noto Emoji Apache-2.0, Twemoji CC-BY-4.0;
names and tags (emojibase) MIT.
"""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sana_lab.config import digests
from sana_lab.types import Json


class Archive(NamedTuple):
    """A package of npm at one version."""

    package: str
    version: str
    sha256: str
    inside: str  # the folder or file that is read of it

    @property
    def file(self) -> str:
        """Name of the file that `npm pack` writes."""
        return f"{self.package}-{self.version}.tgz"


ARCHIVES: dict[str, Archive] = {
    "noto": Archive(
        "emoji-datasource-google",
        "16.0.0",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        "package/img/google/64/",
    ),
    "twemoji": Archive(
        "emoji-datasource-twitter",
        "16.0.0",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        "package/img/twitter/64/",
    ),
    "names": Archive(
        "emojibase-data",
        "17.0.0",
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
        "package/en/data.json",
    ),
}
"""Vendor of drawings, or `names`, to its archive."""

VENDORS = ("noto", "twemoji")


def fetch_command(folder: Path) -> str:
    """The command with which the user fetches the archives."""
    packages = " ".join(f"{archive.package}@{archive.version}" for archive in ARCHIVES.values())
    return f"mkdir -p {folder} && npm pack --pack-destination {folder} {packages}"


def check(folder: Path) -> None:
    """ValueError unless all three archives are in the folder, with the expected content."""
    for archive in ARCHIVES.values():
        _check(folder, archive)


def drawings(folder: Path, vendor: str) -> dict[str, bytes]:
    """PNG files of a vendor by code (see `code`), in the archive's order. ValueError as for `check`."""
    return {code(Path(name).stem): content for name, content in _members(folder, ARCHIVES[vendor])}


def names(folder: Path) -> list[Json]:
    """Entries of emojibase's table in English: label, hexcode, tags, skins ... ValueError as for `check`."""
    return json.loads(next(content for _, content in _members(folder, ARCHIVES["names"])))


def code(points: str) -> str:
    """Normal form of code points in hexadecimal, joined by hyphens: lower case, without the variation selector."""
    return "-".join(point for point in points.lower().split("-") if point != "fe0f")


def _members(folder: Path, archive: Archive) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the files inside an archive that are read."""
    with tarfile.open(_check(folder, archive)) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.name.startswith(archive.inside) else None
            if file is not None:
                yield member.name, file.read()


def _check(folder: Path, archive: Archive) -> Path:
    """The archive's file, whose content was verified."""
    path = folder / archive.file
    if not path.is_file():
        raise ValueError(f"data 'emoji': there is no {path}{_others(folder)}; fetch it: {fetch_command(folder)}")
    digest = digests.sha256(path)
    if digest != archive.sha256:
        raise ValueError(
            f"data 'emoji': {path} has sha256 {digest[:12]}..., expected {archive.sha256[:12]}... of "
            f"{archive.package} {archive.version}; fetch it again: {fetch_command(folder)}"
        )
    return path


def _others(folder: Path) -> str:
    """What lies in the folder in place of an archive."""
    present = sorted(path.name for path in folder.glob("*.tgz"))
    return f" (there is {', '.join(present[:3])})" if present else ""
