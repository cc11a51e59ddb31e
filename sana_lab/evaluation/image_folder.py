"""Measures of images that are already in a folder: any layout with captions, GenEval's, or DPG-Bench's grids."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sana_lab.data import captions
from sana_lab.evaluation import Measure, Report
from sana_lab.evaluation.held_out import folder_data
from sana_lab.evaluation.image_files import ImageFile, Skipped, batches
from sana_lab.evaluation.run_measures import Source, refer
from sana_lab.types import Json

REFERENCE_SIZE = 256  # pixels a side of the real images of `eval.captions`


def is_image_folder(folder: Path) -> bool:
    """Whether a folder holds images to evaluate, rather than a model."""
    return folder.is_dir() and not (folder / "model_index.json").is_file() and not (folder / "config.json").is_file()


def measure_folder(folder: Path, measures: Mapping[str, Measure], options: Json, skipped: Skipped) -> dict[str, Report]:
    """Each measure's report on the images of a folder, at their own sizes; each file is read once.

    A measure may read a layout of its own (`Measure.add_folder`). ValueError for too many unreadable files, or a
    measure that cannot use the folder.
    """
    refer(measures, Source(_generate, (), folder_data(options, REFERENCE_SIZE).real_images))
    others = [m for m in measures.values() if not m.add_folder(folder)]
    files = _files(folder) if others else []
    for measure in others:
        measure.check_rows([file.row for file in files])
    for images, part in batches(files, options["batch"], skipped):
        for measure in others:
            measure.add(images, [file.row for file in part])
    return {name: measure.report() for name, measure in measures.items()}


def captioned_files(folder: Path) -> list[ImageFile]:
    """Image files, sorted by name, with their first caption as prompt; without captions the prompt is empty."""
    entries = captions.entries(folder, default="")
    return [ImageFile(folder / e.name, str(folder / e.name), {"prompt": e.captions[0]}) for e in entries]


def geneval_files(folder: Path) -> list[ImageFile]:
    """Image files of GenEval's layout with their rows. ValueError names what is missing or unreadable."""
    from sana_lab.evaluation.geneval import folder as geneval_folder

    return [ImageFile(path, str(path), each.row) for each in geneval_folder.read(folder) for path in each.images]


def _files(folder: Path) -> list[ImageFile]:
    from sana_lab.evaluation.geneval.folder import is_geneval

    return geneval_files(folder) if is_geneval(folder) else captioned_files(folder)


def _generate(prompts: list[str], noise_indices: list[int]) -> Tensor:
    raise AssertionError("a folder generates no images")
