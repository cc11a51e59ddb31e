"""How cost grows with the work: CPU seconds and memory against n, with the fitted exponent.

    python benchmarks/growth.py                         every case, about ten minutes on one core
    python benchmarks/growth.py --only distances plan   some of them
    python benchmarks/growth.py --largest 10000         no n above

Each point is a process of its own: CPU seconds of the work alone (minimum of three where one takes under 0.3 s), and
how far the peak of its resident memory rises above what it had before the work. The exponent is the slope of log
seconds against log n over the points of at least 5 ms: 1 is linear. Writes growth.json and table.md.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from common import RESULTS

from sana_lab import environment
from sana_lab.types import Json

Work = Callable[[], object]

SHORTEST = 0.005
"""Seconds below which a point is not used for the exponent."""

USUAL = 50_000
"""Images of a published FID."""

WIDTH = 2048
"""Features of an image, as of Inception."""


class Case(NamedTuple):
    """Work of size n. `prepare(n)` is not timed."""

    n: str  # what n counts
    work: str  # what is timed
    sizes: Sequence[int]
    prepare: Callable[[int], Work]
    expected: float  # exponent that the algorithm has


def distances(n: int) -> Work:
    from sana_lab.evaluation.distances.shared_pairs import SharedPairs

    fake, real = _features(n, 0), _features(n, 1)
    return lambda: SharedPairs(fake, real, ("kid", "precision", "recall", "density", "coverage"), same=False)


def moments(n: int) -> Work:
    from sana_lab.evaluation.distances.moments import moments

    rows = _features(n, 0)
    return lambda: moments(rows).gaussian()


def report(n: int) -> Work:
    from sana_lab.evaluation import report_files
    from sana_lab.tracking.store import Store

    store, numbers = Store(Path("runs")), np.random.default_rng(0).normal(size=n).tolist()
    columns = {f"c{i}": {"values": numbers, "drawn": "x", "images_per_prompt": 1} for i in range(10)}
    run = store.start_run("evaluation", "growth", {})

    def work() -> object:
        report_files.write(store, run, {"measures": {}, "per_image": columns})
        return report_files.read(store, run)["per_image"]["c3"]["values"].read()

    return work


def curve(n: int) -> Work:
    from sana_lab.tracking.store import Point, Store

    store = Store(Path("runs"))
    run, now = store.start_run("evaluation", "growth", {}), time.time()
    for start in range(0, n, 1000):
        store.log_points(run, [Point("train/loss", 1.0, s, now) for s in range(start, min(n, start + 1000))])
    return lambda: store.history(run, "train/loss")


def plan(n: int) -> Work:
    from sana_lab.ablation import plan

    values = "".join(f"    r{i}: {{system.shift: {1 + i / 1000}}}\n" for i in range(n // 10))
    text = f"title: t\nbase: shapes\naxes:\n  shift:\n{values}seeds: {list(range(10))}\n"
    Path("ablations").mkdir(exist_ok=True)
    Path("ablations/growth.yaml").write_text(text)
    plan.load("growth")  # what is read once, such as the experiment
    return lambda: plan.load("growth")


def order(n: int) -> Work:
    from sana_lab.data.stream import Order

    epochs = Order(n, 0)
    return lambda: [epochs.at(range(start, start + 64)) for start in range(0, 100 * 64, 64)]


CASES = {
    "distances": Case(
        "images a side",
        f"KID, precision, recall, density and coverage, {WIDTH} features",
        (1000, 2000, 4000, 8000),
        distances,
        2,
    ),
    "moments": Case("images", f"mean and covariance of FID, {WIDTH} features", (1000, 4000, 16000), moments, 1),
    "report": Case("images", "write a report of ten columns, read one of them", (1000, 10_000, 100_000), report, 1),
    "curve": Case("points", "read a curve from MLflow's database", (1000, 10_000, 50_000), curve, 1),
    "plan": Case("trials", "plan an ablation", (100, 300, 1000), plan, 1),
    "order": Case("items", "items of 100 batches of 64 in a new epoch", (10_000, 100_000, 1_000_000), order, 1),
}


def _features(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed)).relu_()


def measure(case: str, n: int) -> Json:
    """Seconds and rise of the peak memory of one point, in this process and an empty folder."""
    work = CASES[case].prepare(n)
    before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, list[float]()
    while not seconds or (seconds[0] < 0.3 and len(seconds) < 3):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    rise = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"n": n, "seconds": min(seconds), "memory_mib": rise}


def exponent(points: Sequence[Json]) -> float | None:
    """Slope of log seconds against log n; None with fewer than two points that last."""
    lasting = [(math.log(p["n"]), math.log(p["seconds"])) for p in points if p["seconds"] >= SHORTEST]
    if len(lasting) < 2:
        return None
    x, y = np.array(lasting).T
    return float(np.polyfit(x, y, 1)[0])


def table(results: Json) -> str:
    """The results as Markdown."""
    lines = [
        "| Work | n | CPU seconds by n | Memory above the inputs (MiB) | Exponent | Expected |",
        "| :-- | :-- | :-- | :-- | --: | --: |",
    ]
    for name, each in results["cases"].items():
        case = CASES[name]
        seconds = ", ".join(f"{p['n']:,}: {p['seconds']:.3g}" for p in each["points"])
        memory = ", ".join(f"{p['memory_mib']:.0f}" for p in each["points"])
        slope = "-" if each["exponent"] is None else f"{each['exponent']:.2f}"
        lines.append(f"| {case.work} | {case.n} | {seconds} | {memory} | {slope} | {case.expected:g} |")
    about = results["environment"]
    lines += ["", *extrapolated(results["cases"]), f"One thread of {about['cpu']}, commit {about['commit'][:10]}.", ""]
    return "\n".join(lines)


def extrapolated(cases: Json) -> list[str]:
    """The time of distances of the usual number of images, which is too long to measure here."""
    if "distances" not in cases:
        return []
    last = cases["distances"]["points"][-1]
    seconds = last["seconds"] * (USUAL / last["n"]) ** CASES["distances"].expected
    return [f"Distances of {USUAL:,} images a side, by the last point and the expected exponent: {seconds:.0f} s."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--largest", type=int, default=sys.maxsize, metavar="N")
    parser.add_argument("--out", type=Path, default=RESULTS / "growth", metavar="FOLDER")
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)  # a process's own work
    arguments = parser.parse_args()
    if arguments.point:
        torch.set_num_threads(1)
        print(json.dumps(measure(arguments.point[0], int(arguments.point[1]))))
        return
    cases: Json = {}
    for name in arguments.only:
        points = [_in_process(name, n) for n in CASES[name].sizes if n <= arguments.largest]
        cases[name] = {"points": points, "exponent": exponent(points)}
        seconds = ", ".join(f"{p['n']}: {p['seconds']:.3g} s" for p in points)
        print(f"{name}: {seconds}; exponent {cases[name]['exponent']}", flush=True)
    results = {"environment": environment.environment(), "cases": cases}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "growth.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.out / "table.md").write_text(table(results))
    print(table(results))


def _in_process(case: str, n: int) -> Json:
    """A point in a new process, in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).resolve()), "--point", case, str(n)]
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    point: Json = json.loads(done.stdout.splitlines()[-1])
    return point


if __name__ == "__main__":
    main()
