"""What `eval` can judge: a trained system, a diffusers pipeline, or pictures that lie in a folder already."""

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sana_lab.config import experiments, specs
from sana_lab.config.paths import check_file
from sana_lab.config.specs import SpecError
from sana_lab.data import captions, importers
from sana_lab.data.images import UnreadableError, read
from sana_lab.diffusion.sampling import Sampling
from sana_lab.evaluation import Measure, Report, dpg
from sana_lab.evaluation.distances import reference
from sana_lab.evaluation.dpg import Dpg
from sana_lab.evaluation.geneval import folder as geneval_folder
from sana_lab.evaluation.geneval.measure import GenEval
from sana_lab.evaluation.reconstruction import to_uint8
from sana_lab.evaluation.suite import Draw, Subject, refer
from sana_lab.peers.pipeline import Peer
from sana_lab.systems.text2image import TextToImage
from sana_lab.types import Json

TOLERATED = 0.05
"""The share of a folder's pictures that may be unreadable."""


class HeldOut(NamedTuple):
    """Real pictures with captions that nothing was trained on."""

    rows: list[Json]  # {"prompt"}
    real: Callable[[], Iterable[Tensor]] | None


def sampler(system: TextToImage) -> Draw:
    """(prompts, image indices) -> images uint8; what `evaluation` needs of a system, so it can judge any other too."""
    sampling = Sampling(**system.experiment["sampling"])
    size, options = experiments.image_size(system.experiment["data"]), system.experiment["eval"]
    return lambda prompts, indices: system.sample(
        prompts, size=size, sampling=sampling, seed=options["seed"], indices=indices, batch=options["batch"]
    ).cpu()


def of_system(system: TextToImage, options: Json) -> Subject:
    """A text2image system under its experiment's options; held-out data are its own, or `eval.captions`."""
    if options["captions"] or "name" not in system.experiment["data"]:
        return Subject(sampler(system), *folder_data(options, experiments.image_size(system.experiment["data"])))
    data = specs.build("data", system.experiment["data"].get("source", system.experiment["data"]))
    return Subject(sampler(system), *held_out(data, options))


def of_peer(peer: Peer, options: Json, sampling: Json, size: int) -> Subject:
    """A diffusers pipeline; its steps and guidance are its own where `sampling` says nothing."""
    told: Json = {k: sampling.get(k) for k in ("steps", "guidance")}
    return Subject(
        lambda prompts, indices: peer.sample(
            prompts, size=size, seed=options["seed"], indices=indices, batch=options["batch"], **told
        ).cpu(),
        *folder_data(options, size),
    )


def held_out(data: Any, options: Json) -> HeldOut:
    """Up to `held_out` of a data module's held-out pictures, read when they are needed."""
    data.setup("validate")
    n = min(options["held_out"], data.len_val)
    chunks = [range(i, min(i + options["batch"], n)) for i in range(0, n, options["batch"])]
    prompts = [prompt for chunk in chunks for prompt in _prompts(data, chunk)]
    return HeldOut(
        [{"prompt": prompt} for prompt in prompts],
        (lambda: (to_uint8(data.batch_at(chunk, "val").images) for chunk in chunks)) if n else None,
    )


def folder_data(options: Json, size: int) -> HeldOut:
    """The folder that `eval.captions` names, at that size; nothing where it names none."""
    if not options["captions"]:
        return HeldOut([], None)
    spec = {"name": "folder", "root": options["captions"], "size": size, "held_out": 0}
    data: Any = specs.build("data", spec)
    data.setup("fit")
    n = min(options["held_out"], data.len_train)
    rows = [{"prompt": prompt} for prompt in data.prompts_at(range(n))]
    chunks = [range(i, min(i + options["batch"], n)) for i in range(0, n, options["batch"])]
    return HeldOut(rows, lambda: (to_uint8(data.batch_at(chunk).images) for chunk in chunks))


def main_stats(options: argparse.Namespace) -> None:
    """`sana-lab stats FOLDER`: reference statistics of its pictures, with what they are of."""
    check_file(options.out)
    spec = experiments.apply({}, [f"extractor={options.extractor}"])["extractor"]
    extractor = specs.build("extractor", spec)
    skipped: dict[str, str] = {}
    images = real_pictures(options, skipped)
    found = reference.make(images, extractor, features=options.features, batch=options.batch)
    reference.save(found, options.out)
    print(f"{options.out}: {found.record['n']} pictures, sha256 {found.record['images_sha256'][:16]}")
    print("\n".join(f"skipped {name}: {why}" for name, why in skipped.items()), end="")


def real_pictures(options: argparse.Namespace, skipped: dict[str, str]) -> Iterator[Tensor]:
    """The pictures of a folder, of MJHQ-30K or of COCO, at their own sizes, in batches."""
    if options.layout == "mjhq":
        importers.mjhq(options.folder)
    if options.coco:
        importers.coco(options.coco, options.folder)
    return (images for images, _ in batches(plain_pictures(options.folder), options.batch, skipped))


def _prompts(data: Any, indices: Sequence[int]) -> list[str]:
    found = data.prompts_at(indices, "val")
    return list(found)


# Pictures that are there already


def is_pictures(folder: Path) -> bool:
    """Whether a folder holds pictures to be judged, of GenEval's layout or any other."""
    return folder.is_dir() and not (folder / "model_index.json").is_file() and not (folder / "config.json").is_file()


def is_geneval(folder: Path) -> bool:
    """GenEval's layout: numbered folders with metadata."""
    return any(p.name.isdigit() and (p / geneval_folder.METADATA).is_file() for p in folder.iterdir() if p.is_dir())


def judge_folder(
    folder: Path, measures: Mapping[str, Measure], options: Json, skipped: dict[str, str]
) -> dict[str, Report]:
    """Each measure's report on the pictures of a folder, at their own sizes; each file is read once.

    DPG-Bench's grids are cut by its own measure. Files that cannot be read go into `skipped`, by name with the reason.
    ValueError where they are more than TOLERATED of all, or a measure cannot use the folder.
    """
    refer(measures, Subject(_nothing, (), folder_data(options, 256).real))
    grids = {name: dpg.score_folder(folder, m) for name, m in measures.items() if isinstance(m, Dpg)}
    rest = {name: m for name, m in measures.items() if name not in grids}
    if not rest:
        return grids
    if any(isinstance(m, GenEval) for m in rest.values()) and not is_geneval(folder):
        raise SpecError(f"geneval needs {folder} in GenEval's layout: 00000/metadata.jsonl and 00000/samples/0000.png")
    stream = geneval_pictures(folder) if is_geneval(folder) else plain_pictures(folder)
    for images, rows in batches(stream, options["batch"], skipped):
        for measure in rest.values():
            measure.add(images, rows)
    return grids | {name: measure.report() for name, measure in rest.items()}


def _nothing(prompts: list[str], indices: list[int]) -> Tensor:
    raise AssertionError("a folder draws nothing")


def geneval_pictures(folder: Path) -> Iterator[tuple[Path, Json]]:
    """(file, its row) in order."""
    return ((path, one.row) for one in geneval_folder.read(folder) for path in one.images)


def plain_pictures(folder: Path) -> Iterator[tuple[Path, Json]]:
    """(file, {"prompt"}) by name; a picture without a caption has an empty one."""
    return ((folder / e.name, {"prompt": e.captions[0]}) for e in captions.entries(folder, default=""))


def batches(
    stream: Iterable[tuple[Path, Json]], most: int, skipped: dict[str, str]
) -> Iterator[tuple[Tensor, list[Json]]]:
    """Neighbours of one size together; what cannot be read goes into `skipped`. ValueError where that is too much."""
    total = 0
    for _, group in groupby(_readable(stream, skipped), key=lambda one: one[0].shape):
        while part := list(islice(group, most)):
            total += len(part)
            yield torch.stack([image for image, _ in part]), [row for _, row in part]
    if len(skipped) > TOLERATED * (total + len(skipped)):
        told = "; ".join(f"{name}: {why}" for name, why in [*skipped.items()][:5])
        raise ValueError(f"{len(skipped)} of {total + len(skipped)} pictures cannot be read ({told})")


def _readable(stream: Iterable[tuple[Path, Json]], skipped: dict[str, str]) -> Iterator[tuple[Tensor, Json]]:
    for path, row in stream:
        try:
            yield torch.from_numpy(np.array(read(path))).permute(2, 0, 1), row
        except UnreadableError as error:
            skipped[str(path)] = str(error)
