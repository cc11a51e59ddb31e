"""Verdicts of claims that a recipe got after its run, from the cells of a committed table.

python benchmarks/verdicts.py NAME ...     of ablations/paper; writes table.json and table.md of results/paper/NAME

A verdict says that its claim was added after the run: whoever added it had seen the numbers.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from sana_lab.ablation import plan
from sana_lab.report import render
from sana_lab.report.claims import Verdict, verdicts
from sana_lab.report.table import Cell, Row
from sana_lab.types import Json

RESULTS = Path(__file__).parent / "results" / "paper"
ADDED = "claim added after the run"


def main(names: Sequence[str]) -> None:
    for name in names:
        table, recipe = json.loads((RESULTS / name / "table.json").read_text()), plan.load(f"paper/{name}", scale="toy")
        new = added(table, verdicts(rows(table), recipe.table.expect, recipe.table.stand_in))
        table["verdicts"] += [verdict._asdict() for verdict in new]
        (RESULTS / name / "table.json").write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n")
        text = (RESULTS / name / "table.md").read_text()
        (RESULTS / name / "table.md").write_text(inserted(text, new))
        print(name, *new, sep="\n  ")


def rows(table: Json) -> list[Row]:
    """The rows of a table.json."""
    cells = [{name: Cell(**cell) for name, cell in row["cells"].items()} for row in table["rows"]]
    return [Row(**{**row, "cells": own}) for row, own in zip(table["rows"], cells, strict=True)]


def added(table: Json, found: Sequence[Verdict]) -> list[Verdict]:
    """The verdicts on claims that a table.json lacks."""
    claims = {(v["better"], v["worse"], v["claimed"]) for v in table["verdicts"]}
    new = [v for v in found if (v.better, v.worse, v.claimed) not in claims]
    return [v._replace(why=f"{v.why}; {ADDED}") for v in new]


def inserted(text: str, new: Sequence[Verdict]) -> str:
    """A table.md with further verdicts below its own."""
    lines = text.splitlines()
    last = max(i for i, line in enumerate(lines) if line.startswith("- Expected: "))
    lines[last + 1 : last + 1] = [f"- {render.markdown_text(str(verdict))}" for verdict in new]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])
