"""Whether an image's time from blocks is that of the whole model: both in the same rounds, in one process.

python benchmarks/blocks.py     SANA-0.6B at 512 px on the CPU: about 10 minutes on two quiet cores, 14 GB of memory
"""

import argparse
import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from sana_lab import environment
from sana_lab.bench.parts import STAGES, Part, columns, time_parts
from sana_lab.bench.probes import ProbeSettings
from sana_lab.bench.record import device_name
from sana_lab.config import specs
from sana_lab.costs.timing import Clock, quantile
from sana_lab.types import Json

RESULTS = Path(__file__).parent / "results" / "blocks"

BAR = 0.05
"""Largest difference of the sum from the whole, as a share of the whole."""


def compare(parts: Sequence[Part], whole: Sequence[Part], rounds: int, clock: Clock | None = None) -> Json:
    """Seconds from blocks and of the whole, by stage and in total: medians over rounds, all rounds, and their ratio."""
    settings, readings = ProbeSettings(torch.device("cpu"), rounds, 1), dict[str, list[float]]()
    time_parts([*parts, *whole], settings, float("inf"), clock, readings)
    sums, wholes = (time_parts(side, settings, 0.0, clock, readings) for side in (parts, whole))
    table: Json = {}
    stages = [stage for stage in STAGES if any(part.stage == stage for part in whole)]
    for stage in (*stages, "total"):
        ours, theirs = ([getattr(r, stage) for r in side] for side in (sums, wholes))
        medians = {"blocks_s": quantile(ours, 0.5), "whole_s": quantile(theirs, 0.5)}
        ratio = medians["blocks_s"] / medians["whole_s"]
        table[stage] = {**medians, "ratio": ratio, "blocks_rounds_s": ours, "whole_rounds_s": theirs}
    return {"stages": table, "within": abs(table["total"]["ratio"] - 1) <= BAR, "bar": BAR, **_spread(sums)}


def _spread(sums: Any) -> Json:
    return {name: value for name, value in columns(sums).items() if name in ("blocks_range", "blocks_rounds")}


def parts_table(parts: Sequence[Part]) -> list[Json]:
    """What was timed, and how often it is called in an image."""
    return [{"stage": part.stage, "part": part.name, "calls": part.calls} for part in parts]


def markdown(record: Json) -> str:
    """The result as a table with its conditions."""
    lines = ["| | From blocks (s) | Whole (s) | Ratio |", "| :-- | --: | --: | --: |"]
    for stage, row in record["stages"].items():
        numbers = " | ".join(f"{_span(row[f'{side}_rounds_s'], row[f'{side}_s'])}" for side in ("blocks", "whole"))
        lines.append(f"| {stage} | {numbers} | {row['ratio']:.3f} |")
    verdict = "within" if record["within"] else "NOT within"
    lines += [
        "",
        f"{record['experiment']} at {record['size']} px, {record['dtype']}, {record['device']}: medians of "
        f"{record['blocks_rounds']} rounds, in brackets the fastest and the slowest. The sum is {verdict} "
        f"{record['bar']:.0%} of the whole model. {record['day']}, commit {str(record['commit'])[:10]}.",
        "",
    ]
    return "\n".join(lines)


def _span(values: Sequence[float], middle: float) -> str:
    return f"{middle:.3g} [{min(values):.3g}, {max(values):.3g}]"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="sana_600m_512", help="a text2image experiment")
    parser.add_argument("--size", type=int, default=512, help="pixels a side")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, at least 2")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for check.json and check.md")
    given = parser.parse_args()
    if given.rounds < 2:
        parser.error(f"--rounds is {given.rounds}, expected at least 2, for a spread")
    device = torch.device("cpu")
    probe: Any = specs.build("probe", {"name": "image_blocks", "experiment": given.experiment, "size": given.size})
    parts, whole = probe.parts(device), probe.whole(device)
    result = compare(parts, whole, given.rounds)
    facts = {"experiment": given.experiment, "size": given.size, "dtype": probe.dtype, "device": device_name(device)}
    machine = environment.environment()
    record = {**facts, "day": f"{date.today():%Y-%m-%d}", **machine, **result, "parts": parts_table(parts)}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "check.json").write_text(json.dumps(record, indent=1) + "\n")
    (given.out / "check.md").write_text(page := markdown(record))
    print(page)
    return 0 if result["within"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
