"""`layout: classes`: a folder of pictures for each class, as ImageNet lies on the disk."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Literal

from sana_lab.config.specs import SpecError
from sana_lab.data.files import Files
from sana_lab.data.layouts import Layout, Place, Record, splits_of

CaptionAs = Literal["number", "name"]


class Classes(Layout):
    """The folder that holds a picture is its class: `train/n01440764/*.JPEG`, or `n01440764/*.JPEG` without splits.

    Numbers are those of torchvision's ImageFolder: classes in the order of their names, over all splits. SpecError
    where pictures lie in the root itself or at several depths.
    """

    def __init__(
        self,
        root: Path,
        /,
        label: CaptionAs = "number",  # caption: the number of the class, "0", "1" ..., or the name of the folder
    ) -> None:
        super().__init__(root)
        self.label = label

    @cached_property
    def files(self) -> list[str]:  # type: ignore[override]
        """The pictures."""
        pictures = Files(self.root).pictures
        if loose := [name for name in pictures if "/" not in name]:
            raise SpecError(f"{str(self.root / loose[0])!r} is in no folder; layout 'classes' expects one per class")
        if len({name.count("/") for name in pictures}) > 1:
            uneven = min(pictures, key=lambda name: name.count("/"))
            raise SpecError(
                f"{str(self.root / uneven)!r} is above the folders of classes; layout 'classes' expects pictures as "
                "CLASS/*.jpg, or as SPLIT/CLASS/*.jpg (ImageNet's val is sorted into its classes first)"
            )
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
