"""Blocks of a self-contained HTML page: sortable tables, figures, sliders, outcomes by prompt.

Nothing is loaded from elsewhere. Every function returns HTML; texts are escaped here, so callers pass them as they are.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

STYLE, SCRIPT = Path(__file__).with_name("page.css"), Path(__file__).with_name("page.js")
"""What goes into every page."""


class Cell(NamedTuple):
    """A cell of a table."""

    text: str
    value: float | str | None = None  # what it is sorted by; None: its text
    title: str = ""  # shown while the pointer is over it: the runs that a number comes from
    bold: bool = False
    link: str = ""


class Outcomes(NamedTuple):
    """Outcomes by prompt of one row of a table."""

    label: str
    shares: Mapping[str, float]  # prompt -> share of correct images
    tasks: Mapping[str, str]  # prompt -> task
    reasons: Mapping[str, str]  # prompt -> why images are wrong
    pictures: Mapping[str, str] = {}  # prompt -> WebP as base64


def document(title: str, parts: Sequence[str]) -> str:
    """The whole page."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{escape(title)}</title><style>{STYLE.read_text(encoding='utf-8')}</style>"
    body = "\n".join([*parts, f"<script>{SCRIPT.read_text(encoding='utf-8')}</script>"])
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def section(title: str, *parts: str) -> str:
    """A section with a heading that `contents` links to; empty without parts."""
    inner = "\n".join(part for part in parts if part)
    return f'<section id="{anchor(title)}"><h2>{escape(title)}</h2>\n{inner}\n</section>' if inner else ""


def anchor(title: str) -> str:
    """The identifier of a section."""
    return "".join(letter if letter.isalnum() else "-" for letter in title.lower())


def contents(titles: Sequence[str]) -> str:
    """Links to sections."""
    links = "".join(f'<a href="#{anchor(title)}">{escape(title)}</a>' for title in titles)
    return f"<nav>{links}</nav>"


def heading(text: str) -> str:
    """The heading of the page."""
    return f"<h1>{escape(text)}</h1>"


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph, such as the question or the answer; empty for no text."""
    return f'<p class="{kind}">{escape(text)}</p>' if text else ""


def table(heads: Sequence[str], rows: Sequence[Sequence[Cell]], labels: int) -> str:
    """A table that is sorted by a click on a head; the first `labels` columns are text."""
    ths = "".join(
        f'<th class="label" scope="col"><button>{escape(h)}</button></th>' if j < labels
        else f'<th scope="col"><button>{escape(h)}</button></th>'
        for j, h in enumerate(heads)
    )  # fmt: skip
    body = "\n".join(f"<tr>{''.join(_cell(cell, j < labels) for j, cell in enumerate(row))}</tr>" for row in rows)
    inner = f"<thead><tr>{ths}</tr></thead>\n<tbody>\n{body}\n</tbody>"
    return f'<div class="wide"><table class="sortable">{inner}</table></div>'


def _cell(cell: Cell, is_label: bool) -> str:
    inner = escape(cell.text)
    inner = f'<a href="{escape(cell.link)}">{inner}</a>' if cell.link else inner
    inner = f"<b>{inner}</b>" if cell.bold else inner
    attributes = ' class="label"' if is_label else ""
    attributes += f' data-value="{escape(str(cell.value))}"' if cell.value is not None else ""
    attributes += f' title="{escape(cell.title)}"' if cell.title else ""
    return f"<td{attributes}>{inner}</td>"


def notes(lines: Sequence[str]) -> str:
    """A list of sentences; empty without any."""
    return f'<ul class="notes">{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul>' if lines else ""


def figure(path: Path, caption: str) -> str:
    """A PNG file with a caption."""
    image = f'<img alt="{escape(caption)}" src="{embedded(path)}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def embedded(path: Path) -> str:
    """A PNG file as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def pairs(figures: Sequence[str]) -> str:
    """Figures side by side where the page is wide enough."""
    return f'<div class="pair">{"".join(figures)}</div>' if figures else ""


def slider(rows: Mapping[str, Mapping[int, Path]]) -> str:
    """Pictures of each label by training step, and a slider over the steps; a row shows its latest until then. Empty
    without pictures of several steps."""
    steps = sorted({step for files in rows.values() for step in files})
    if len(steps) < 2:
        return ""
    figures = "\n".join(_frames(label, files, steps) for label, files in rows.items())
    last = len(steps) - 1
    control = f'<input type="range" min="0" max="{last}" value="{last}" aria-label="training step"><output></output>'
    inner = f'<div class="controls">{control}</div>{figures}'
    return f'<div class="slider" data-steps="{escape(json.dumps(steps))}">{inner}</div>'


def _frames(label: str, files: Mapping[int, Path], steps: Sequence[int]) -> str:
    """One row's pictures, an element for each step that it has one of."""
    images = []
    for i, step in enumerate(steps):
        latest = max((s for s in files if s <= step), default=min(files))
        images.append(f'<img alt="{escape(label)}, step {latest}" data-step="{i}" src="{embedded(files[latest])}">')
    return f"<figure>{''.join(images)}<figcaption>{escape(label)}</figcaption></figure>"


def outcomes(rows: Sequence[Outcomes]) -> str:
    """Outcomes by prompt of two rows that the reader chooses, with pictures; at first where they differ. Empty without
    any."""
    prompts = list(dict.fromkeys(prompt for row in rows for prompt in row.shares))
    if not prompts:
        return ""
    tasks = {prompt: task for row in rows for prompt, task in row.tasks.items()}
    data = {
        "prompts": prompts,
        "tasks": [tasks.get(prompt, "") for prompt in prompts],
        "rows": [
            {
                "label": row.label,
                "shares": [row.shares.get(prompt) for prompt in prompts],
                "reasons": [row.reasons.get(prompt, "") for prompt in prompts],
                "pictures": [row.pictures.get(prompt, "") for prompt in prompts],
            }
            for row in rows
        ],
    }
    selects = "".join(_select([row.label for row in rows], chosen) for chosen in (0, len(rows) - 1))
    box = "" if len(rows) == 1 else " checked"
    only = f'<label><input type="checkbox"{box}> only where they differ</label><output></output>'
    head = '<th class="label">Task</th><th class="label">Prompt</th><th class="row"></th><th class="row"></th>'
    script = json.dumps(data).replace("</", "<\\/")
    return (
        f'<div class="outcomes"><div class="controls">{selects}{only}</div>'
        f'<script type="application/json">{script}</script>'
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody></tbody></table></div></div>'
    )


def _select(labels: Sequence[str], chosen: int) -> str:
    """A menu of labels."""
    options = "".join(
        f'<option value="{i}"{" selected" if i == chosen else ""}>{escape(label)}</option>'
        for i, label in enumerate(labels)
    )
    return f'<select aria-label="row">{options}</select>'


def details(title: str, value: Any) -> str:
    """Plain data as JSON, folded."""
    text = json.dumps(value, indent=1, ensure_ascii=False, default=str)
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"
