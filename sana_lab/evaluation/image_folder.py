"""Measures of images that are already in a folder: any layout with captions, GenEval's, or DPG-Bench's grids."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from sana_lab.config.specs import SpecError
from sana_lab.data import captions
from sana_lab.evaluation import Measure, Report, dpg
from sana_lab.evaluation.geneval import folder as geneval_folder
from sana_lab.evaluation.geneval.measure import GenEval
from sana_lab.evaluation.image_files import ImageFile, Skipped, batches
from sana_lab.evaluation.run_measures import Source, refer
from sana_lab.evaluation.sources import folder_data
from sana_lab.types import Json

REFERENCE_SIZE = 256  # pixels a side of the real images of `eval.captions`


def is_image_folder(folder: Path) -> bool:
    """Whether a folder holds images to evaluate, rather than a model."""
    return folder.is_dir() and not (folder / "model_index.json").is_file() and not (folder / "config.json").is_file()


def measure_folder(folder: Path, measures: Mapping[str, Measure], options: Json, skipped: Skipped) -> dict[str, Report]:
    """Each measure's report on the images of a folder, at their own sizes; each file is read once.

    `dpg` reads its grids itself. ValueError for too many unreadable files, or a measure that cannot use the folder.
    """
    refer(measures, Source(_generate, (), folder_data(options, REFERENCE_SIZE).real_images))
    grids = {name: dpg.score_folder(folder, m) for name, m in measures.items() if isinstance(m, dpg.Dpg)}
    others = {name: m for name, m in measures.items() if name not in grids}
    if not others:
        return grids
    for images, files in batches(_files(folder, others), options["batch"], skipped):
        for measure in others.values():
            measure.add(images, [file.row for file in files])
    return grids | {name: measure.report() for name, measure in others.items()}


def captioned_files(folder: Path) -> list[ImageFile]:
    """Image files, sorted by name, with their first caption as prompt; without captions the prompt is empty."""
    entries = captions.entries(folder, default="")
    return [ImageFile(folder / e.name, str(folder / e.name), {"prompt": e.captions[0]}) for e in entries]


def geneval_files(folder: Path) -> list[ImageFile]:
    """Image files of GenEval's layout with their rows. ValueError names what is missing or unreadable."""
    return [ImageFile(path, str(path), each.row) for each in geneval_folder.read(folder) for path in each.images]


def _files(folder: Path, measures: Mapping[str, Measure]) -> Sequence[ImageFile]:
    geneval = [m for m in measures.values() if isinstance(m, GenEval)]
    if not geneval_folder.is_geneval(folder):
        if geneval:
            raise SpecError(
                f"geneval needs {folder} in GenEval's layout: 00000/metadata.jsonl and 00000/samples/0000.png"
            )
        return captioned_files(folder)
    files = geneval_files(folder)
    for measure in geneval:
        for file in files:
            measure.match(file.row)
    return files


def _generate(prompts: list[str], noise_indices: list[int]) -> Tensor:
    raise AssertionError("a folder generates no images")
