"""Regions of a picture with prompts of their own (region-aware generation, arXiv 2411.06558): where, and how they hold.

A region is a box in fractions of the picture, so that it means the same at every size. Its edges move to the nearest
edges of latent tokens. Regions of one picture do not overlap; what none covers belongs to the picture's own prompt.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import combinations
from typing import Literal, NamedTuple, final, get_args

from sana_lab.config.ranges import Share
from sana_lab.config.specs import SpecError

Fractions = tuple[float, float, float, float]
"""x0, y0, x1, y1 of a box, from 0 (left, top) to 1 (right, bottom)."""

Box = tuple[int, int, int, int]
"""x0, y0, x1, y1 of a box in latent tokens."""

Binding = Literal["cropped", "whole"]
"""What a region's prompt denoises while it is bound: the region alone, or the whole picture, of which the region is
kept."""


class Region(NamedTuple):
    """A box of a picture and what is in it."""

    box: Fractions
    prompt: str


class Regions(ABC):
    """The regions of each prompt's picture, and how they hold: bound for the first evaluations, then blended.

    While bound, each region sees the velocity of its own prompt alone. Afterwards its tokens read both prompts by
    cross-attention, the region's with weight `blend`.
    """

    def __init__(self, hard: float, blend: float, binding: Binding) -> None:
        for name, share in (("hard", hard), ("blend", blend)):
            if not 0 <= share <= 1:
                near = 1 if share > 1 else 0
                raise SpecError(f"{name} of regions is {share:g}, expected a share from 0 to 1; the nearest is {near}")
        if not hard and not blend:
            raise SpecError("hard and blend of regions are 0, which does nothing; expected one above 0")
        if binding not in get_args(Binding):
            raise SpecError(f"binding of regions is {binding!r}, expected {' or '.join(get_args(Binding))}")
        self.hard, self.blend, self.binding = hard, blend, binding

    @abstractmethod
    def plan(self, prompt: str) -> Sequence[Region]:
        """The regions of a prompt's picture; none leaves its sampling as it is."""

    def boxes(self, prompt: str, grid: tuple[int, int]) -> list[tuple[Box, str]]:
        """Box in tokens and prompt of each region, for a grid of (h, w) tokens. SpecError for regions that do not
        fit."""
        regions = list(self.plan(prompt))
        for region in regions:
            if not isinstance(region, Region):
                raise SpecError(
                    f"plan of {type(self).__name__} gives {region!r}, expected a Region, such as "
                    "Region((0, 0, 0.5, 1), 'a red circle')"
                )
        check(regions)
        return [(on_grid(region, grid), region.prompt) for region in regions]


@final
class Fixed(Regions):
    """The same regions in the picture of every prompt; `sana-lab sample --region` writes them."""

    def __init__(
        self,
        # "x0,y0,x1,y1: prompt" each, in fractions of the picture from its top left corner; at least one.
        regions: list[str] = [],  # noqa: B006  (never changed)
        hard: Share = 0.3,  # share of the evaluations, from the first on, in which regions are bound; at least one
        blend: Share = 0.3,  # weight of a region's prompt beside the picture's in cross-attention after that
        binding: Binding = "cropped",  # while bound, a region's prompt denoises the region alone, or the whole picture
    ) -> None:
        super().__init__(hard, blend, binding)
        self.regions = [parse(text) for text in regions]
        if not regions:
            raise SpecError("regions is empty, expected at least one, such as '0,0,0.5,1: a red circle'")
        check(self.regions)

    def plan(self, prompt: str) -> Sequence[Region]:
        return self.regions


NUMBER = r"\s*(-?(?:\d+\.?\d*|\.\d+))\s*"
WRITTEN = re.compile(rf"{NUMBER},{NUMBER},{NUMBER},{NUMBER}:(.*)", re.DOTALL)


def parse(text: str) -> Region:
    """A region from "x0,y0,x1,y1: prompt". SpecError for text of another form."""
    match = WRITTEN.fullmatch(text)
    if match is None:
        raise SpecError(
            f"region {text!r} has another form, expected 'x0,y0,x1,y1: prompt', such as '0,0,0.5,1: a red circle'"
        )
    x0, y0, x1, y1 = map(float, match.groups()[:4])
    return Region((x0, y0, x1, y1), match.group(5).strip())


def check(regions: Sequence[Region]) -> None:
    """SpecError for a region outside of the picture, without area or prompt, or that overlaps another."""
    for region in regions:
        x0, y0, x1, y1 = region.box
        if min(region.box) < 0 or max(region.box) > 1:
            raise SpecError(
                f"region {written(region.box)} is outside of the picture, expected fractions of it from 0 to 1 "
                f"(of pixels: divided by its sides); the nearest is {written(_clamped(region.box))}"
            )
        if x0 >= x1 or y0 >= y1:
            near = (*_rising(x0, x1), *_rising(y0, y1))
            raise SpecError(
                f"region {written(region.box)} is empty, expected x0 < x1 and y0 < y1; the nearest is "
                f"{written((near[0], near[2], near[1], near[3]))}"
            )
        if not region.prompt:
            raise SpecError(f"region {written(region.box)} has no prompt, expected text after the colon")
    for first, second in combinations(regions, 2):
        if overlap(first.box, second.box):
            raise SpecError(
                f"regions {written(first.box)} and {written(second.box)} overlap, expected regions beside one another; "
                f"the nearest is {written(_beside(first.box, second.box))} in place of the second"
            )


def on_grid(region: Region, grid: tuple[int, int]) -> Box:
    """The box of a region in tokens, its edges moved to the nearest ones of (h, w). SpecError if none is left."""
    height, width = grid
    x0, x1 = (round(x * width) for x in region.box[::2])
    y0, y1 = (round(y * height) for y in region.box[1::2])
    if x0 < x1 and y0 < y1:
        return x0, y0, x1, y1
    columns, rows = _token(region.box[0], region.box[2], width), _token(region.box[1], region.box[3], height)
    near = (columns[0] / width, rows[0] / height, columns[1] / width, rows[1] / height)
    raise SpecError(
        f"region {written(region.box)} is smaller than a latent token, of which the picture has {width} x {height}; "
        f"the nearest is {written(near)}"
    )


def overlap(a: Fractions, b: Fractions) -> bool:
    """Whether two boxes share an area."""
    return max(a[0], b[0]) < min(a[2], b[2]) and max(a[1], b[1]) < min(a[3], b[3])


def written(box: Fractions) -> str:
    """A box as it is given: 0,0,0.5,1."""
    return ",".join(f"{x:.4g}" for x in box)


def _clamped(box: Fractions) -> Fractions:
    """The part of a box inside the picture, or the whole picture if there is none."""
    x0, y0, x1, y1 = (min(max(x, 0.0), 1.0) for x in box)
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else (0.0, 0.0, 1.0, 1.0)


def _rising(low: float, high: float) -> tuple[float, float]:
    """Two different ends in order; the whole side if they are equal."""
    return (0.0, 1.0) if low == high else (min(low, high), max(low, high))


def _beside(first: Fractions, second: Fractions) -> Fractions:
    """The largest part of the second box beside the first, or what the first leaves of the picture."""
    for x0, y0, x1, y1 in (second, (0.0, 0.0, 1.0, 1.0)):
        parts = [
            (x0, y0, first[0], y1),
            (first[2], y0, x1, y1),
            (x0, y0, x1, first[1]),
            (x0, first[3], x1, y1),
        ]
        area, best = max((max(p[2] - p[0], 0) * max(p[3] - p[1], 0), p) for p in parts)
        if area > 0:
            return best
    return second


def _token(low: float, high: float, count: int) -> tuple[int, int]:
    """The tokens from `low` to `high`, at least the one at their middle."""
    first, last = round(low * count), round(high * count)
    if first < last:
        return first, last
    middle = min(int((low + high) / 2 * count), count - 1)
    return middle, middle + 1
