"""Regions from GenEval's prompts: halves of the picture for two objects whose positions the prompt says."""

import re
from collections.abc import Sequence
from typing import final

from sana_lab.config.ranges import Share
from sana_lab.diffusion.regions import Binding, Fractions, Region, Regions

HALVES: dict[str, tuple[Fractions, Fractions]] = {
    "left of": ((0, 0, 0.5, 1), (0.5, 0, 1, 1)),
    "right of": ((0.5, 0, 1, 1), (0, 0, 0.5, 1)),
    "above": ((0, 0, 1, 0.5), (0, 0.5, 1, 1)),
    "below": ((0, 0.5, 1, 1), (0, 0, 1, 0.5)),
}
"""Position -> the boxes of the first and of the second object."""

PREFIX = r"(?P<prefix>a photo of )?"
THING = r"an? (?:(?! and | with )[^,.])+?"
RELATION = re.compile(rf"{PREFIX}(?P<a>{THING}) (?:(?:to|on) the )?(?P<how>{'|'.join(HALVES)}) (?P<b>{THING})")
PAIR = re.compile(rf"{PREFIX}(?P<a>{THING}) and (?P<b>{THING})")


@final
class Relations(Regions):
    """Two halves for "a photo of A left of B" (right of, above, below), each with its object as the prompt; other
    prompts have no regions."""

    def __init__(
        self,
        hard: Share = 0.3,  # share of the evaluations, from the first on, in which regions are bound; at least one
        blend: Share = 0.3,  # weight of a region's prompt beside the picture's in cross-attention after that
        binding: Binding = "cropped",  # while bound, a region's prompt denoises the region alone, or the whole picture
        pairs: bool = False,  # regions for "A and B" too: the left half and the right one
    ) -> None:
        super().__init__(hard, blend, binding)
        self.pairs = pairs

    def plan(self, prompt: str) -> Sequence[Region]:
        match, how = RELATION.fullmatch(prompt), None
        if match is not None:
            how = match["how"]
        elif self.pairs and (match := PAIR.fullmatch(prompt)) is not None:
            how = "left of"
        if match is None or how is None:
            return []
        prefix = match["prefix"] or ""
        boxes = HALVES[how]
        return [Region(box, prefix + match[name]) for box, name in zip(boxes, ("a", "b"), strict=True)]
