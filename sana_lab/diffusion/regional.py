"""The velocity of a batch of pictures with regions: bound while t is large, blended cross-attention below."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sana_lab.config.specs import SpecError
from sana_lab.diffusion.guidance import TIME_TOLERANCE, prepare
from sana_lab.diffusion.regions import Box, Regions
from sana_lab.models.dit import Blockwise, SamplingDit
from sana_lab.types import Text, Velocity

Guide = Callable[..., Velocity]
"""(captions, null text, refine=...) -> guided velocity at any size (`guidance.guided` with its options)."""


class RegionPlan(NamedTuple):
    """The regions of a batch of pictures on a grid of tokens."""

    grid: tuple[int, int]  # (h, w) tokens of a picture
    owners: list[int]  # picture of each region
    boxes: list[Box]
    prompts: list[str]

    @property
    def covered(self) -> set[int]:
        """The pictures that their regions cover."""
        areas: defaultdict[int, int] = defaultdict(int)
        for owner, (x0, y0, x1, y1) in zip(self.owners, self.boxes, strict=True):
            areas[owner] += (x1 - x0) * (y1 - y0)
        return {owner for owner, area in areas.items() if area == self.grid[0] * self.grid[1]}


def plan(rule: Regions, prompts: Sequence[str], grid: tuple[int, int]) -> RegionPlan | None:
    """The regions of all prompts, None if there are none. SpecError for regions that do not fit."""
    regions = [(i, *region) for i, prompt in enumerate(prompts) for region in rule.boxes(prompt, grid)]
    if not regions:
        return None
    owners, boxes, texts = zip(*regions, strict=True)
    return RegionPlan(grid, [*owners], [*boxes], [*texts])


class Encoded(NamedTuple):
    """A plan with the features of its prompts, a row each."""

    plan: RegionPlan
    text: Text


def regional(
    guide: Guide, text: Text, null: Text, regions: Encoded, rule: Regions, times: Tensor, patch: int
) -> Velocity:
    """Velocity for captions (B, L, D), a null text (1 or B rows) and the regions of their pictures.

    `times` (M,) are those of all evaluations, from noise to data, of which the first share `rule.hard` binds: rounded,
    and at least one if it is above 0. Latents have `patch` cells in a token.
    """
    bound = max(round(rule.hard * len(times)), rule.hard > 0)
    soft = guide(text, null, refine=lambda model: blended(model, regions, rule.blend))
    if not bound:
        return soft
    hard = binding(guide, text, null, regions, patch, rule.binding == "cropped")
    starts = times if times.ndim == 1 else times[:, 0]  # of intervals, where a solver steps by mean velocities
    until = float(starts[:bound].min()) - TIME_TOLERANCE
    return lambda x, t: (hard if t.flatten()[0].item() >= until else soft)(x, t)


def blended(model: SamplingDit, regions: Encoded, blend: float) -> SamplingDit:
    """A denoiser whose tokens inside a region also read its prompt, with weight `blend`. SpecError without blocks."""
    if not blend:
        return model
    if not isinstance(model, Blockwise):
        raise SpecError(
            f"sampling.regions blends prompts in the blocks of a denoiser, and {type(model.dit).__name__} has none; "
            "expected blend 0, or hard 1"
        )
    weights = torch.zeros(len(regions.plan.boxes), *regions.plan.grid, 1)
    for weight, (x0, y0, x1, y1) in zip(weights, regions.plan.boxes, strict=True):
        weight[y0:y1, x0:x1] = blend
    other = prepare(model.dit, regions.text)
    assert isinstance(other, Blockwise)
    return model.also_reading(other, regions.plan.owners, weights)


def binding(guide: Guide, text: Text, null: Text, regions: Encoded, patch: int, cropped: bool) -> Velocity:
    """Each region from its own prompt alone, which denoises the region (`cropped`) or the whole picture; all else from
    the picture's prompt."""
    plan = regions.plan
    rest = [i for i in range(len(text.tokens)) if i not in plan.covered]
    base = guide(_rows(text, rest), _rows(null, rest)) if rest else None
    boxes: list[Box] = [(x0 * patch, y0 * patch, x1 * patch, y1 * patch) for x0, y0, x1, y1 in plan.boxes]
    groups: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        groups[(y1 - y0, x1 - x0) if cropped else (0, 0)].append(i)
    velocities = [
        (group, guide(_rows(regions.text, group), _rows(null, [plan.owners[i] for i in group])))
        for group in groups.values()
    ]

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        out = torch.empty_like(x)
        if base is not None:
            out[rest] = base(x[rest], t[rest])
        for group, inner in velocities:
            owners = [plan.owners[i] for i in group]
            parts = [_cut(x[o], boxes[i]) if cropped else x[o] for i, o in zip(group, owners, strict=True)]
            values = inner(torch.stack(parts), t[owners])
            for i, owner, value in zip(group, owners, values, strict=True):
                _cut(out[owner], boxes[i]).copy_(value if cropped else _cut(value, boxes[i]))
        return out

    return velocity


def _rows(text: Text, rows: list[int]) -> Text:
    """These rows of a text; one row is for all."""
    return text if len(text.tokens) == 1 else Text(text.tokens[rows], text.mask[rows])


def _cut(x: Tensor, box: Box) -> Tensor:
    """The box of latents (C, h, w), a view."""
    x0, y0, x1, y1 = box
    return x[:, y0:y1, x0:x1]
