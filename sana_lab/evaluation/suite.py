"""Several measures of one subject in as few passes as there are sets of prompts: every image is drawn and read once."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sana_lab.evaluation import Measure, Report, distributed
from sana_lab.types import Json

Draw = Callable[[list[str], list[int]], Tensor]
"""(prompts, noise indices) -> images (B, 3, H, W) uint8"""


class Subject(NamedTuple):
    """What is measured: something that draws, with captions for measures that bring no prompts, and real images.

    `captions` are rows {"prompt": ...}; `real` yields uint8 batches (B, 3, H, W) each time it is called.
    """

    draw: Draw
    captions: Sequence[Json] = ()
    real: Callable[[], Iterable[Tensor]] | None = None


class Pass(NamedTuple):
    """Measures that look at the same images."""

    rows: Sequence[Json]
    each: int  # images of one row
    names: list[str]

    @property
    def owners(self) -> list[int]:
        """The row of each image, in order."""
        return [i for i in range(len(self.rows)) for _ in range(self.each)]


def run(measures: Mapping[str, Measure], subject: Subject, batch: int) -> dict[str, Report]:
    """Each measure's report. Image k of row i has the noise index i * images_per_prompt + k, whoever is measured.

    ValueError where a measure lacks captions or real images, before anything is drawn.
    """
    passes = plan(measures, subject)
    refer(measures, subject)
    for one in passes:
        for images, rows in drawn(subject.draw, one, batch):
            for name in one.names:
                measures[name].add(images, rows)
    return {name: measure.report() for name, measure in measures.items()}


def plan(measures: Mapping[str, Measure], subject: Subject) -> list[Pass]:
    """Measures grouped by what they look at. ValueError without measures, and for what the subject cannot give."""
    if not measures:
        raise ValueError("there is nothing to measure; expected at least one measure in `eval.measures`")
    passes: list[Pass] = []
    for name, measure in measures.items():
        _check(name, measure, subject)
        rows, each = subject.captions if measure.rows is None else measure.rows, measure.images_per_prompt
        same = next((p for p in passes if p.each == each and list(p.rows) == list(rows)), None)
        passes = passes if same else [*passes, Pass(rows, each, [])]
        (same or passes[-1]).names.append(name)
    return passes


def refer(measures: Mapping[str, Measure], subject: Subject) -> None:
    """Show the real images to those that compare with them."""
    wanting = [m for m in measures.values() if m.needs_reference]
    if wanting and subject.real:
        for images in subject.real():
            for measure in wanting:
                measure.refer(images)


def drawn(draw: Draw, one: Pass, batch: int) -> Iterator[tuple[Tensor, list[Json]]]:
    """(images, their rows) in order, of every process; each draws a batch of them in turn."""
    owners = one.owners
    for first in range(0, len(owners), batch * distributed.size()):
        together = range(first, min(first + batch * distributed.size(), len(owners)))
        mine = together[distributed.rank() * batch : (distributed.rank() + 1) * batch]
        images = _drawn(draw, [one.rows[owners[i]]["prompt"] for i in mine], list(mine)) if mine else None
        yield distributed.gather(images), [one.rows[owners[i]] for i in together]


def _drawn(draw: Draw, prompts: list[str], indices: list[int]) -> Tensor:
    """ValueError for images of another kind than was asked for."""
    images = draw(prompts, indices)
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[:2] != (len(prompts), 3):
        given = f"{images.dtype} {tuple(images.shape)}"
        raise ValueError(f"expected {len(prompts)} uint8 images (B, 3, H, W); given {given}")
    return images


def _check(name: str, measure: Measure, subject: Subject) -> None:
    if measure.rows is None and not subject.captions:
        raise ValueError(f"measure {name!r} has no prompts of its own, and there are no captions of held-out data")
    if measure.needs_reference and subject.real is None:
        raise ValueError(f"measure {name!r} needs real images to compare with: held-out data, or a file as `reference`")
