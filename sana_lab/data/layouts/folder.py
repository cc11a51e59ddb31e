"""`layout: folder`: picture files at any depth, with captions in a manifest or in .txt files beside them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from sana_lab.config.specs import RUNTIME
from sana_lab.data import captions
from sana_lab.data.files import Files, times
from sana_lab.data.layouts import Layout, Place, Record, fingerprint_of


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
        return self._regular(Files(self.root))

    def _regular(self, files: Files) -> list[str]:
        return [name for name in files.names if (self.root / name).is_file()]

    def fingerprint(self) -> str:
        """Of the files, and of the manifest that is chosen among them or lies elsewhere."""
        path = captions.manifest_of(self.root, self.manifest)
        if path is None:
            return super().fingerprint()
        stat, files = path.stat(), Files(self.root)
        self.times = {str(path.absolute()): times(path), **files.folders}
        return fingerprint_of(self.root, self._regular(files)) + f" {path.name} {stat.st_size} {stat.st_mtime_ns}"

    def records(self) -> Iterator[Record]:
        """The pictures by name."""
        listing = captions.Listing(self.root, self.manifest, self.caption)
        self.skipped |= {name: why for name, why in listing.skipped.items() if name not in listing.unlisted}
        self.unused |= {name: listing.skipped[name] for name in sorted(listing.unlisted)}
        self.unused |= dict.fromkeys(listing.dropped, "a caption that is left out")
        for entry in listing:
            yield Record(entry.name, entry.captions, Place(), entry.scores, entry.group, entry.split)

    def read(self, name: str, place: Place) -> bytes:
        """The file of that name."""
        return (self.root / name).read_bytes()
