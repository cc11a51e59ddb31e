"""Controls of the exact score: writes results/exact/controls.json and the table controls.md, in some minutes.

python benchmarks/exact.py
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from sana_lab import api, environment
from sana_lab.evaluation.geneval.measure import GenEval
from sana_lab.shapes import debris
from sana_lab.shapes.controls import CONTROLS, Control, images
from sana_lab.shapes.exact import ExactShapes
from sana_lab.types import Json

FOLDER = Path(__file__).parent / "results" / "exact"
SIZES = (64, 128, 256)
AUTOENCODERS = {"8x": "shapes_vae_f8", "32x": "shapes_dcae_f32"}
PROMPTS = 100  # per task, or as many as exist


def main() -> None:
    rows: dict[str, Json] = {}
    for name, control in controls().items():
        sizes = SIZES if name in CONTROLS else SIZES[:1]
        rows[name] = {str(size): score(control, size) for size in sizes}
        print(name, {size: (cell["exact"], cell["geneval"]) for size, cell in rows[name].items()}, flush=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    settings = {"prompts_per_task": PROMPTS, "debris": debris.constants()}
    record = {"controls": rows, "settings": settings, "environment": environment.environment()}
    (FOLDER / "controls.json").write_text(json.dumps(record, indent=1) + "\n")
    (FOLDER / "controls.md").write_text(table(rows))


def controls() -> dict[str, Control]:
    """The library's controls, and right scenes after the reconstruction of autoencoders that ship, for 64 px."""
    right = {
        f"right, {ratio} reconstruction": Control(True, spoil=reconstruction(name))
        for ratio, name in AUTOENCODERS.items()
    }
    order = sorted([*CONTROLS.items(), *right.items()], key=lambda item: not item[1].right)
    return dict(order)


def reconstruction(name: str) -> Callable[[NDArray[np.uint8]], NDArray[np.uint8]]:
    """An autoencoder's encoding and decoding of one image."""
    autoencoder = api.load(name).autoencoder

    @torch.no_grad()
    def reconstruct(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        pixels = autoencoder.decode(autoencoder.encode(torch.from_numpy(image)[None] / 127.5 - 1))[0]
        result: NDArray[np.uint8] = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
        return result

    return reconstruct


def score(control: Control, size: int) -> Json:
    """Exact and GenEval of a control's images: means over the tasks to which it applies, and numbers."""
    exact, geneval = (kind(prompts_per_task=PROMPTS, images_per_prompt=1) for kind in (ExactShapes, GenEval))
    for image, row in images(control, exact.rows, size):
        for measure in (exact, geneval):
            measure.add(torch.from_numpy(image)[None], [row])
    summaries = [measure.verdicts.details() for measure in (exact, geneval)]
    values = {name: each["overall"] for name, each in zip(("exact", "geneval"), summaries, strict=True)}
    return {**values, "images": summaries[0]["images"], "tasks": sorted(summaries[0]["tasks"])}


def table(rows: dict[str, Json]) -> str:
    """The scores in Markdown."""
    header = ("Images", "n", *(f"Exact, {size} px" for size in SIZES), *(f"GenEval, {size} px" for size in SIZES))
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, _align(len(header)), *_lines(rows))) + "\n"


def _align(columns: int) -> Sequence[str]:
    return [":--", *["--:"] * (columns - 1)]


def _lines(rows: dict[str, Json]) -> Iterator[Sequence[str]]:
    for name, cells in rows.items():
        values = [f"{cells[str(s)][k]:.3f}" if str(s) in cells else "" for k in ("exact", "geneval") for s in SIZES]
        yield [name, str(cells[str(SIZES[0])]["images"]), *values]


if __name__ == "__main__":
    main()
