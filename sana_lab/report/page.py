"""A table with its plots, pictures, outcomes and runs as one HTML file that needs nothing else: `report.html`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sana_lab.config.atomic_write import write_text
from sana_lab.report import html
from sana_lab.report.columns import PLOTTED_COSTS, column
from sana_lab.report.html import Outcomes
from sana_lab.report.render import all_notes, as_table, body_of, cells_of, published_title
from sana_lab.report.table import Table

NAME = "report.html"

PAIRED = ("by_steps", "by_images", "by_seconds", "training_loss")
"""Parts of the names of plots of curves."""


@dataclass(frozen=True)
class Content:
    """What a report has beside its table and plots."""

    question: str | None = None
    answer: str = ""
    steps: Mapping[str, Mapping[int, Path]] = field(default_factory=dict)  # label -> training step -> PNG of samples
    outcomes: Sequence[Outcomes] = ()
    runs: Sequence[Mapping[str, str]] = ()  # of each trial: row, seed, run, ... in the order to show


def write(table: Table, pictures: Sequence[Path], folder: Path, content: Content | None = None) -> Path:
    """Write report.html with the pictures, PNG files, inside it."""
    path = folder / NAME
    write_text(path, to_html(table, pictures, content))
    return path


def to_html(table: Table, pictures: Sequence[Path] = (), content: Content | None = None) -> str:
    """The page: question, answer, table, published numbers, plots, curves, samples, outcomes, runs and notes."""
    content = content or Content()
    curves = [path for path in pictures if any(part in path.stem for part in PAIRED)]
    samples = [path for path in pictures if path.stem.startswith("samples")]
    others = [path for path in pictures if path not in curves + samples]
    published = []
    if table.published:
        published = [html.paragraph(published_title(table.published)), numbers(as_table(table.published), False)]
    parts = {
        "Table": [numbers(table, True), *published],
        "Intervals and trade-offs": [html.pairs([html.figure(path, caption(path)) for path in others])],
        "Curves": [html.pairs([html.figure(path, caption(path)) for path in curves])],
        "Samples": [*(html.figure(path, "Same prompts, same noise down each column.") for path in samples)],
        "Samples during training": [html.slider(content.steps)],
        "Outcomes by prompt": [html.outcomes(content.outcomes)],
        "Runs": [runs(content.runs)],
        "Notes": [html.notes(all_notes(table))],
    }
    sections = {title: text for title, inner in parts.items() if (text := html.section(title, *inner))}
    head = [html.heading(table.title), html.paragraph(content.question or "", "question")]
    head += [html.paragraph(content.answer, "answer"), html.contents(list(sections))]
    return html.document(table.title, [*head, *sections.values()])


def numbers(table: Table, marked: bool) -> str:
    """The table; each number is sorted by its mean and names its runs."""
    body, cells = body_of(table, marked), cells_of(table)
    rows = []
    for i, row in enumerate(body.rows):
        line = [html.Cell(text) for text in row[: body.labels]]
        for j, text in enumerate(row[body.labels :]):
            cell = cells[i][j]
            value = "" if cell is None or not math.isfinite(cell.mean) else cell.mean
            origin = f"n = {cell.n}; runs: {', '.join(cell.run_ids)}" if cell and cell.run_ids else ""
            line.append(html.Cell(text, value, origin, (i, j + body.labels) in body.bold))
        rows.append(line)
    return html.table(body.heads, rows, body.labels)


def runs(lines: Sequence[Mapping[str, str]]) -> str:
    """A table of the runs that the numbers come from."""
    heads = list(dict.fromkeys(name for line in lines for name in line))
    rows = [[html.Cell(line.get(name, "")) for name in heads] for line in lines]
    return html.table(heads, rows, len(heads)) if heads else ""


def caption(path: Path) -> str:
    """What a plot shows, from its name: `METRIC`, `METRIC_COST`, `METRIC_by_AXIS`."""
    metric, _, axis = path.stem.partition("_by_")
    if axis:
        return f"{column(metric).heading} by {axis.replace('_', ' ')}."
    for cost, words in PLOTTED_COSTS.items():
        if path.stem.endswith(f"_{cost}"):
            head = column(path.stem.removesuffix(f"_{cost}")).heading
            return f"{head} over {words}; the line joins the best trade-offs."
    return f"{column(path.stem).heading}."
