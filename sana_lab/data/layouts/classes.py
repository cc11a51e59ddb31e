"""`layout: classes`: a folder of pictures for each class, as ImageNet lies on the disk."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Literal

from sana_lab.config.specs import SpecError
from sana_lab.data.files import Files
from sana_lab.data.layouts import Layout, Place, Record, splits_of

Label = Literal["number", "name"]


class Classes(Layout):
    """The folder that holds a picture is its class: `train/n01440764/*.JPEG`, or `n01440764/*.JPEG` without splits.

    Numbers are those of torchvision's ImageFolder: classes in the order of their names, over all splits. SpecError
    where pictures lie in the root itself.
    """

    def __init__(
        self,
        root: Path,
        /,
        label: Label = "number",  # caption of a picture: the number of its class, "0", "1" ..., or the folder's name
    ) -> None:
        super().__init__(root)
        self.label = label

    @cached_property
    def files(self) -> list[str]:  # type: ignore[override]
        """The pictures."""
        pictures = Files(self.root).pictures
        if loose := [name for name in pictures if "/" not in name]:
            raise SpecError(f"{str(self.root / loose[0])!r} is in no folder; layout 'classes' expects one per class")
        return pictures

    @cached_property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of their numbers."""
        return sorted({Path(name).parent.name for name in self.files})

    def records(self) -> Iterator[Record]:
        """The pictures by name, each with its class as caption."""
        numbers = {name: str(i) for i, name in enumerate(self.classes)}
        above = [str(Path(name).parent.parent) for name in self.files]  # a class may be called train too
        for name, split in zip(self.files, splits_of(above), strict=True):
            folder = Path(name).parent.name
            yield Record(name, (numbers[folder] if self.label == "number" else folder,), split=split)

    def read(self, name: str, place: Place) -> bytes:
        """The file of that name."""
        return (self.root / name).read_bytes()
