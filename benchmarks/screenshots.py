"""Pictures of a sweep in MLflow and of its report, for docs/images: `python benchmarks/screenshots.py [SWEEP]`.

Needs Chromium and the runs of the sweep under ./runs. Without SWEEP the pictures are of a sweep with invented numbers,
which is written to a temporary folder.
"""

import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))

import browser  # noqa: E402
import sweeps  # noqa: E402

from sana_lab.ablation import generations, plan, results  # noqa: E402
from sana_lab.checkpoints.weights import HOME  # noqa: E402
from sana_lab.tracking import server  # noqa: E402
from sana_lab.tracking.store import Store  # noqa: E402

FOLDER = ROOT / "docs" / "images"
HEIGHTS = {"sweep": 1000, "trials": 760, "charts": 1500, "report": 1300}
"""Pixels of each picture, at a width of 1,280."""


@contextmanager
def serving(store: Store) -> Iterator[str]:
    """The address of a server that answers."""
    port = server.free_port("127.0.0.1", 5800)
    address = f"http://127.0.0.1:{port}"
    with subprocess.Popen(server.command(store, "127.0.0.1", port), env=server.environment()) as process:
        try:
            for _ in range(180):
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=5)
                    break
                except OSError:
                    time.sleep(1)
            yield address
        finally:
            process.terminate()


def take(name: str, url: str) -> None:
    """Write docs/images/NAME.png, of 128 colours and two thirds of the size."""
    path = FOLDER / f"{name}.png"
    browser.picture(url, path, height=HEIGHTS[name], milliseconds=90_000)
    with Image.open(path) as picture:
        small = picture.convert("RGB").resize(
            (picture.width * 2 // 3, picture.height * 2 // 3), Image.Resampling.LANCZOS
        )
    small.quantize(128).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def example() -> str:
    """A sweep with invented numbers in the working directory."""
    sweeps.write_ablation(Path(), text=sweeps.GRID.replace("title: ", "title: Invented numbers, "))
    store = Store(HOME)
    sweeps.finish(store, plan.load("grid"))
    return "grid"


def main(arguments: list[str]) -> None:
    """All pictures."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not arguments:
        os.chdir(tempfile.mkdtemp())
    name = arguments[0] if arguments else example()
    store, ablation = Store(HOME), plan.load(name)
    folder = Path("report")
    results.write(store, ablation.name, ablation.table, generations.refresh(store, ablation), folder)
    with serving(store) as address:
        lines = server.links(store, address, ablation.name, store.experiments()[ablation.name])
        links = dict(line.strip().split(": ", 1) for line in lines)
        for title, link in (("sweep", ablation.name), ("trials", "trials"), ("charts", "charts")):
            take(title, links[link])
    take("report", (folder / "report.html").absolute().as_uri())


if __name__ == "__main__":
    main(sys.argv[1:])
