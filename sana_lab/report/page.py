"""A table with its plots and pictures as one HTML file that needs nothing else."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from sana_lab.config.atomic_write import write_text
from sana_lab.report.render import all_notes, as_table, body_of, published_title
from sana_lab.report.table import Table

NAME = "report.html"

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #1a1a1a }
div.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px }
th, td { padding: 0.3rem 0.6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th.label, td.label { text-align: left }
img { max-width: 100%; margin: 0.5rem 0 }
li { margin: 0.2rem 0 }
"""


def write(table: Table, pictures: Sequence[Path], folder: Path) -> Path:
    """Write report.html with the pictures, PNG files, inside it."""
    path = folder / NAME
    write_text(path, to_html(table, pictures))
    return path


def to_html(table: Table, pictures: Sequence[Path] = ()) -> str:
    """The page: heading, table, published table, notes, pictures."""
    published = []
    if table.published:
        published = [f"<h2>{escape(published_title(table.published))}</h2>", _table(as_table(table.published), False)]
    notes = "\n".join(f"<li>{escape(note)}</li>" for note in all_notes(table))
    parts = [f"<h1>{escape(table.title)}</h1>", _table(table, True), *published, f"<ul>\n{notes}\n</ul>"]
    body = "\n".join([*parts, *map(_picture, pictures)])
    head = f'<meta charset="utf-8"><title>{escape(table.title)}</title><style>{STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _table(table: Table, marked: bool) -> str:
    body = body_of(table, marked)
    heads = "".join(_cell("th", text, j < body.labels) for j, text in enumerate(body.heads))
    rows = [
        "".join(_cell("td", text, j < body.labels, (i, j) in body.bold) for j, text in enumerate(row))
        for i, row in enumerate(body.rows)
    ]
    lines = "\n".join(f"<tr>{row}</tr>" for row in (heads, *rows))
    return f'<div class="wide"><table>\n{lines}\n</table></div>'


def _cell(tag: str, text: str, is_label: bool, bold: bool = False) -> str:
    inner = f"<b>{escape(text)}</b>" if bold else escape(text)
    return f'<{tag} class="label">{inner}</{tag}>' if is_label else f"<{tag}>{inner}</{tag}>"


def _picture(path: Path) -> str:
    title = path.stem.replace("_", " ")
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<h2>{escape(title)}</h2>\n<img alt="{escape(title)}" src="data:image/png;base64,{data}">'
