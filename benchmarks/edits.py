"""Edits of pictures by inversion, judged: writes results/edits/table.json and table.md, in some minutes.

python benchmarks/edits.py [number of pictures]

A picture of two coloured objects is sampled, and kept if it is exact. One object's colour is changed. The edit is right
if the picture holds exactly what the target says, and keeps if also each object's box overlaps its earlier one by half
(intersection over union). The control samples the target anew, from other noise, so that it keeps by chance alone.
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from sana_lab import api, environment
from sana_lab.diffusion.sampling import Sampling
from sana_lab.evaluation.geneval.prompts import row_of
from sana_lab.evaluation.geneval.vocabulary import COLORS, article
from sana_lab.intervals import wilson
from sana_lab.shapes.detector import analyse
from sana_lab.shapes.exact import judge
from sana_lab.shapes.scenes import SHAPES
from sana_lab.systems.editing import edit
from sana_lab.types import Json, Object

FOLDER = Path(__file__).parent / "results" / "edits"
MODEL, STEPS, GUIDANCE, SEED = "shapes_sana", 20, 3.0, 11
INJECT = (0.0, 0.15, 0.3, 0.5)
LEAST_OVERLAP = 0.5


def main(count: int = 100) -> None:
    system, how = api.load(MODEL).eval(), Sampling("rf_solver", STEPS, GUIDANCE)
    sources, targets = map(list, zip(*pairs(count), strict=True))
    images = system.sample(sources, size=64, sampling=Sampling(**api.settings(system, {})), seed=SEED)
    exact = [i for i, (image, text) in enumerate(zip(images, sources, strict=True)) if right(image, text)]
    images, sources, targets = images[exact], [sources[i] for i in exact], [targets[i] for i in exact]
    edited = {f"inject {x:g}": edit(system, images, sources, targets, sampling=how, inject=x) for x in INJECT}
    edited["sampled anew"] = system.sample(targets, size=64, sampling=how, seed=SEED + 1)
    rows = {name: score(images, results, targets) for name, results in edited.items()}
    settings = {"model": MODEL, "pictures": count, "exact": len(exact), "steps": STEPS, "guidance": GUIDANCE}
    record = {"rows": rows, "settings": settings, "environment": environment.environment()}
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "table.json").write_text(json.dumps(record, indent=1) + "\n")
    (FOLDER / "table.md").write_text(table(rows, len(exact)))
    print(table(rows, len(exact)))


def pairs(count: int) -> list[tuple[str, str]]:
    """Prompts of two objects, and the same with another colour of the first."""
    random = torch.Generator().manual_seed(SEED)
    prompts = []
    for _ in range(count):
        a, b = (SHAPES[i] for i in torch.randperm(len(SHAPES), generator=random)[:2].tolist())
        before, after, other = (COLORS[i] for i in torch.randperm(len(COLORS), generator=random)[:3].tolist())
        rest = article(f"{other} {b}")
        prompts.append(tuple(f"a photo of {article(f'{color} {a}')} and {rest}" for color in (before, after)))
    return [(source, target) for source, target in prompts]


def right(image: Tensor, prompt: str) -> bool:
    """Whether an image is exactly what a prompt says."""
    return judge(analyse(image), row_of(prompt, SHAPES))[0]


def score(before: Tensor, after: Tensor, targets: list[str]) -> Json:
    """Shares of right edits, and of those that also keep the places of all objects, with intervals."""
    correct = [right(image, text) for image, text in zip(after, targets, strict=True)]
    kept = [c and keeps(a, b) for c, a, b in zip(correct, before, after, strict=True)]
    return {name: wilson([float(x) for x in values])._asdict() for name, values in (("right", correct), ("kept", kept))}


def keeps(before: Tensor, after: Tensor) -> bool:
    """Whether every object of one image has one of its label at its place in the other."""
    objects = analyse(after).objects
    return all(
        any(o.label == thing.label and overlap(o, thing) >= LEAST_OVERLAP for o in objects)
        for thing in analyse(before).objects
    )


def overlap(a: Object, b: Object) -> float:
    """Intersection over union of two boxes."""
    sides = [max(min(a.box[i + 2], b.box[i + 2]) - max(a.box[i], b.box[i]), 0.0) for i in (0, 1)]
    inside = sides[0] * sides[1]
    areas = [(o.box[2] - o.box[0]) * (o.box[3] - o.box[1]) for o in (a, b)]
    return inside / (sum(areas) - inside)


def table(rows: dict[str, Json], count: int) -> str:
    """The shares in percent with 95 % intervals, in Markdown."""
    lines = [
        f"| edit of a colour, {count} pictures | target right | and all else in its place |",
        "| :-- | --: | --: |",
    ]
    for name, row in rows.items():
        cells = (f"{100 * x['value']:.0f} ({100 * x['low']:.0f} to {100 * x['high']:.0f})" for x in row.values())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
