"""All measures of one source in as few passes as there are sets of prompts: every image is generated once."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sana_lab.evaluation import Measure, Report, distributed
from sana_lab.evaluation.noise_seeds import Generate, pooled
from sana_lab.types import Json


class Source(NamedTuple):
    """A generator of images, with held-out data for measures that need captions or real images."""

    generate: Generate
    captions: Sequence[Json] = ()  # rows {"prompt"}, for measures without built-in prompts
    real_images: Callable[[], Iterable[Tensor]] | None = None  # each call iterates over uint8 batches (B, 3, H, W)
    reference: Json = {}  # noqa: RUF012 - never written to; what the real images are
    other_seeds: Sequence[Generate] = ()  # the same generator with other seeds of noise, whose images count too


class Pass(NamedTuple):
    """Measures of the same images."""

    rows: Sequence[Json]
    images_per_prompt: int  # of all seeds of noise together
    names: list[str]  # of the measures

    def noise_indices(self, limit: int | None = None) -> list[int]:
        """The noise indices of the images, in order: all of them, or `limit` that are evenly spaced."""
        total = len(self.rows) * self.images_per_prompt
        count = total if limit is None else min(limit, total)
        return [i * total // count for i in range(count)]

    def row(self, noise_index: int) -> int:
        """The row index of an image."""
        return noise_index // self.images_per_prompt


def run(measures: Mapping[str, Measure], source: Source, batch: int) -> dict[str, Report]:
    """Each measure's report. ValueError as for `show`."""
    show(measures, source, batch)
    return {name: measure.report() for name, measure in measures.items()}


def show(measures: Mapping[str, Measure], source: Source, batch: int, limit: int | None = None) -> list[Pass]:
    """Generate images and give them to the measures. Image k of row i has the noise index i * images_per_prompt + k,
    for every source; with a limit, only so many images of each set of prompts are generated, evenly spaced.

    Of several seeds of noise, each generates `batch` images at a time. ValueError for missing captions or real images,
    before anything is generated.
    """
    passes = group(measures, source)
    refer(measures, source)
    generators = [source.generate, *source.other_seeds]
    for each in passes:
        generate = pooled(generators, each.images_per_prompt // len(generators))
        for images, rows in generated(generate, each, batch * len(generators), limit):
            _add({name: measures[name] for name in each.names}, images, rows)
    return passes


def group(measures: Mapping[str, Measure], source: Source) -> list[Pass]:
    """Measures grouped by their prompts. ValueError without measures or for one that the source cannot serve."""
    if not measures:
        raise ValueError("there is nothing to measure; expected at least one measure in `eval.measures`")
    passes: list[Pass] = []
    for name, measure in measures.items():
        _check_source(name, measure, source)
        rows, n = source.captions if measure.rows is None else measure.rows, measure.images_per_prompt
        same = next((p for p in passes if p.images_per_prompt == n and list(p.rows) == list(rows)), None)
        passes = passes if same else [*passes, Pass(rows, n, [])]
        (same or passes[-1]).names.append(name)
    return passes


def refer(measures: Mapping[str, Measure], source: Source) -> None:
    """Pass the real images to the measures that compare with them."""
    comparing = [m for m in measures.values() if m.needs_reference]
    if comparing and source.real_images:
        batches = iter(source.real_images())
        while together := list(itertools.islice(batches, distributed.size())):
            own = together[distributed.rank() : distributed.rank() + 1]
            for part in distributed.gather([m.extract_reference(own[0]) for m in comparing] if own else None):
                for measure, extracted in zip(comparing, part, strict=True):
                    measure.collect_reference(extracted)


def _add(measures: Mapping[str, Measure], images: Tensor | None, rows: Sequence[Sequence[Json]]) -> None:
    """Give measures the images of all processes, each of which extracts from its own; rows of each process."""
    own = None if images is None else {n: m.extract(images, rows[distributed.rank()]) for n, m in measures.items()}
    for part, those in zip(distributed.gather(own), rows, strict=True):
        for name, measure in measures.items():
            measure.collect(part[name], those)


def generated(
    generate: Generate, one: Pass, batch: int, limit: int | None = None
) -> Iterator[tuple[Tensor | None, list[list[Json]]]]:
    """(this process's images or None, the rows of each process that has images, in order); each process generates
    `batch` images at a time."""
    indices = one.noise_indices(limit)
    for first in range(0, len(indices), batch * distributed.size()):
        together = indices[first : first + batch * distributed.size()]
        shares = [together[start : start + batch] for start in range(0, len(together), batch)]
        rows = [[one.rows[one.row(i)] for i in share] for share in shares]
        rank = distributed.rank()
        prompts = [row["prompt"] for row in rows[rank]] if rank < len(rows) else []
        images = _generate(generate, prompts, shares[rank]) if prompts else None
        yield images, rows


def _generate(generate: Generate, prompts: list[str], noise_indices: list[int]) -> Tensor:
    """ValueError for images of another shape or type."""
    images = generate(prompts, noise_indices)
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[:2] != (len(prompts), 3):
        actual = f"{images.dtype} {tuple(images.shape)}"
        raise ValueError(f"expected {len(prompts)} uint8 images (B, 3, H, W); given {actual}")
    return images


def _check_source(name: str, measure: Measure, source: Source) -> None:
    if measure.rows is None and not source.captions:
        raise ValueError(f"measure {name!r} has no prompts of its own, and there are no captions of held-out data")
    if measure.rows is None:
        check_captions(name, measure, source.captions)
    if measure.needs_reference and source.real_images is None:
        raise ValueError(f"measure {name!r} needs real images to compare with: held-out data, or a file as `reference`")


def check_captions(name: str, measure: Measure | type[Measure], rows: Sequence[Json]) -> None:
    """ValueError for missing captions. Data that are trained on without captions (`caption: ""`) generate from ""."""
    bare = [row for row in rows if not row["prompt"]]
    images = [row["image"] for row in bare if "image" in row]
    if images or (bare and measure.needs_captions):
        what = "scores images against captions" if measure.needs_captions else "has images generated from captions"
        raise ValueError(
            f"measure {name!r} {what}, and {len(bare)} of {len(rows)} held-out pictures have none"
            f"{': ' + some(images) if images else ''}; expected a .txt beside each, or measures with own prompts"
        )


def some(names: Sequence[str]) -> str:
    """The first names of a list."""
    return ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")
