"""Measures of images that are already in a folder: any layout with captions, GenEval's, or DPG-Bench's grids."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from sana_lab.data import captions
from sana_lab.evaluation import Measure, Report
from sana_lab.evaluation.image_files import ImageFile, Skipped, batches, find_images
from sana_lab.evaluation.run_measures import some
from sana_lab.report.significance import FROM_FOLDER
from sana_lab.types import Json


class FolderReport(NamedTuple):
    """Result of all measures on a folder."""

    reports: dict[str, Report]
    reference: Json  # number and origin of the real images; empty where no measure compares with any
    pairing: Json  # what the numbers per image can be paired by: `drawn` and `images_per_prompt`


def is_image_folder(folder: Path) -> bool:
    """Whether a folder holds images to evaluate, rather than a model."""
    return folder.is_dir() and not (folder / "model_index.json").is_file() and not (folder / "config.json").is_file()


def measure_folder(folder: Path, measures: Mapping[str, Measure], options: Json, skipped: Skipped) -> FolderReport:
    """Each measure's report on the images of a folder, at their own sizes; each file is read once.

    A measure may read a layout of its own (`Measure.add_folder`). One that compares with real images takes the first
    `eval.held_out` pictures on both sides. ValueError for too many unreadable files, pictures without the captions
    that a measure needs, or a measure that cannot use the folder.
    """
    files = _files(folder) if any(m.rows is None for m in measures.values()) else []
    _check_captions(folder, files, measures)
    reference = _refer(measures, options, skipped)
    others = [m for m in measures.values() if not m.add_folder(folder)]
    files = files or (_files(folder) if others else [])
    for measure in others:
        measure.check_rows([file.row for file in files])
    limit = options["held_out"] if reference else len(files)
    whole = [m for m in others if not m.needs_reference]
    for part, users in ((files[:limit], others), (files[limit:] if whole else [], whole)):
        _add(users, part, options["batch"], skipped, len(files))
    counts = {"judged": min(limit, len(files)), "judged_of": len(files)}
    reports = {name: measure.report() for name, measure in measures.items()}
    return FolderReport(reports, {**reference, **counts} if reference else {}, _pairing(folder, files, skipped))


def _pairing(folder: Path, files: Sequence[ImageFile], skipped: Skipped) -> Json:
    """By the prompts of the measured pictures in order, or by their names where one has none."""
    measured = [file for file in files or find_images(folder) if file.name not in skipped.reasons]
    prompts = [file.row.get("prompt", "") for file in measured]
    runs = {len(list(run)) for _, run in groupby(prompts)}
    names = [file.path.relative_to(folder).as_posix() for file in measured]
    facts = json.dumps(["prompts", prompts] if all(prompts) else ["names", names])
    identity = f"{FROM_FOLDER}{hashlib.sha256(facts.encode()).hexdigest()[:16]}"
    return {"drawn": identity, "images_per_prompt": runs.pop() if len(runs) == 1 and all(prompts) else 1}


def _add(measures: Sequence[Measure], files: Sequence[ImageFile], batch: int, skipped: Skipped, total: int) -> None:
    for images, part in batches(files, batch, skipped, total=total):
        for measure in measures:
            measure.add(images, [file.row for file in part])


def _refer(measures: Mapping[str, Measure], options: Json, skipped: Skipped) -> Json:
    """Pass the real pictures of `eval.captions` to the measures that compare, read as the judged ones are."""
    comparing = {name: m for name, m in measures.items() if m.needs_reference}
    if not comparing:
        return {}
    if not options["captions"]:
        raise ValueError(
            f"measure {next(iter(comparing))!r} needs real images to compare with: eval.captions=FOLDER, or a file of "
            "`sana-lab stats` as its `reference`"
        )
    folder = Path(options["captions"])
    files, own = _files(folder), Skipped(folder)
    real = files[: options["held_out"]]
    for images, _ in batches(real, options["batch"], own):
        for measure in comparing.values():
            measure.refer(images)
    skipped.reasons |= {f"{folder / name}": reason for name, reason in own.reasons.items()}
    return {"origin": str(folder), "n": len(real) - len(own.reasons), "of": len(files), "size": None}


def _check_captions(folder: Path, files: Sequence[ImageFile], measures: Mapping[str, Measure]) -> None:
    """ValueError that names and counts the pictures without a caption, where a measure scores against captions."""
    scoring = [name for name, m in measures.items() if m.rows is None and m.needs_captions]
    bare = [Path(file.name).relative_to(folder).as_posix() for file in files if not file.row["prompt"]]
    if scoring and bare:
        raise ValueError(
            f"measure {scoring[0]!r} scores images against captions, and {len(bare)} of {len(files)} pictures in "
            f"{str(folder)!r} have none: {some(bare)}; expected a .txt beside each, a captions.jsonl of the pictures "
            "to measure, or `needs_captions = False` in a class that reads no prompts"
        )


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
