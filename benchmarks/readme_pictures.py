"""README's pictures: eight prompts of the shipped model, judged; writes results/shapes_sana/readme.png and readme.json.

python benchmarks/readme_pictures.py     some seconds
"""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from sana_lab import api, environment
from sana_lab.report import grids
from sana_lab.shapes.detector import analyse
from sana_lab.shapes.exact import judge
from sana_lab.types import Json

FOLDER = Path(__file__).parent / "results" / "shapes_sana"
MODEL, SEED = "shapes_sana", 0
SAMPLING: dict[str, Any] = {"steps": 20, "guidance": 3.0, "regions": {"name": "relations"}}


def thing(shape: str, color: str | None = None, count: int = 1, **more: Json) -> Json:
    """What a prompt asks for, as in GenEval's rows."""
    return {"class": shape, "count": count, **({"color": color} if color else {}), **more}


ASKS = {
    "a photo of a red circle": [thing("circle", "red")],
    "a photo of a pink cross": [thing("cross", "pink")],
    "a photo of three triangles": [thing("triangle", count=3)],
    "a photo of two yellow squares": [thing("square", "yellow", count=2)],
    "a photo of a blue square and a green triangle": [thing("square", "blue"), thing("triangle", "green")],
    "a photo of a red circle left of a blue square": [
        thing("square", "blue"),
        thing("circle", "red", position=["left of", 0]),
    ],
    "a photo of a green cross above a yellow circle": [
        thing("circle", "yellow"),
        thing("cross", "green", position=["above", 0]),
    ],
    "a photo of a square right of a triangle": [
        thing("triangle"),
        thing("square", position=["right of", 0]),
    ],
}
"""Prompts, each with its objects; one of each of GenEval's tasks and two more relations."""


def main() -> None:
    images = pictures()
    verdicts = judged(images)
    grids.captioned(images, list(ASKS)).save(FOLDER / "readme.png")
    record = {
        "model": MODEL,
        "seed": SEED,
        "sampling": SAMPLING,
        "pictures": [
            {"prompt": p, "right": right, "reason": why} for p, (right, why) in zip(ASKS, verdicts, strict=True)
        ],
        "environment": environment.environment(),
    }
    (FOLDER / "readme.json").write_text(json.dumps(record, indent=1) + "\n")
    for prompt, (right, why) in zip(ASKS, verdicts, strict=True):
        print(f"{'right' if right else 'wrong'}  {prompt}{'' if right else f': {why}'}")


def pictures() -> Tensor:
    """The pictures (8, 3, 64, 64) uint8, of the first seed."""
    return api.sample(MODEL, list(ASKS), seed=SEED, **SAMPLING)


def judged(images: Tensor) -> list[tuple[bool, str]]:
    """Whether each picture holds exactly what its prompt says, and what is wrong."""
    return [judge(analyse(i), {"include": asks}) for i, asks in zip(images, ASKS.values(), strict=True)]


if __name__ == "__main__":
    main()
