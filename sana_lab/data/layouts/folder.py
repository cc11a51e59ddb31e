"""`layout: folder`: picture files at any depth, with captions in a manifest or in .txt files beside them."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated

from sana_lab.config.specs import RUNTIME
from sana_lab.data import captions
from sana_lab.data.captions import Contents
from sana_lab.data.files import Files
from sana_lab.data.layouts import Layout, Place, Record


class FolderLayout(Layout):
    """Picture files below the root; see `data.captions` for the sources of captions. A root that is a manifest means
    the folder that holds it."""

    def __init__(
        self,
        root: Path,
        /,
        manifest: Annotated[str | None, RUNTIME] = None,  # .jsonl, .csv or .parquet; null looks in the root
        caption: str | None = None,  # caption of pictures without one, "" for none; null is an error
    ) -> None:
        super().__init__(root.parent if root.is_file() else root)
        self.manifest, self.caption = (str(root.absolute()) if root.is_file() else manifest), caption

    @property
    def files(self) -> list[str]:  # type: ignore[override]
        """The pictures, the manifest or the files of captions."""
        return [name for name in Files(self.root).names if (self.root / name).is_file()]

    def fingerprint(self) -> str:
        """Of the files, and of the manifest that is chosen among them or lies elsewhere."""
        path = captions.manifest_of(self.root, self.manifest)
        if path is None:
            return super().fingerprint()
        stat = path.stat()
        return super().fingerprint() + f" {path.name} {stat.st_size} {stat.st_mtime_ns}"

    def records(self) -> Iterator[Record]:
        """The pictures by name."""
        unlisted = self._contents.unlisted
        self.skipped |= {name: why for name, why in self._contents.skipped.items() if name not in unlisted}
        self.unused |= {name: self._contents.skipped[name] for name in sorted(unlisted)}
        self.unused |= dict.fromkeys(self._contents.dropped, "a caption that is left out")
        for entry in self._contents.entries:
            yield Record(entry.name, entry.captions, Place(), entry.scores, entry.group, entry.split)

    def read(self, name: str, place: Place) -> bytes:
        """The file of that name."""
        return (self.root / name).read_bytes()

    @cached_property
    def _contents(self) -> Contents:
        return captions.contents(self.root, self.manifest, self.caption)
