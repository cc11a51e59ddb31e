"""A table as Markdown, LaTeX (booktabs), CSV and JSON."""

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from sana_lab.config.atomic_write import write_text
from sana_lab.report import significance
from sana_lab.report.columns import Column, column, words
from sana_lab.report.table import Cell, Published, Row, Table, choose, shows_interval, unique

HOLE = "—"


def to_markdown(table: Table) -> str:
    """A heading, the table, the published table if there is one, and the notes."""
    blocks = [f"### {markdown_text(table.title)}", markdown_block(table, marked=True)]
    if table.published:
        blocks += [f"**{markdown_text(published_title(table.published))}**", markdown_block(as_table(table.published))]
        blocks += [markdown_text(" ".join(table.published.notes))] if table.published.notes else []
    blocks.append("\n".join(f"- {markdown_text(note)}" for note in all_notes(table)))
    return "\n\n".join(blocks) + "\n"


def to_latex(table: Table) -> str:
    """A LaTeX `table` environment with escaped text; requires booktabs, and graphicx for wide tables."""
    parts = [
        r"\begin{table}[t]",
        r"\centering",
        rf"\caption{{{_latex(table.title)}}}",
        _latex_block(table, marked=True),
    ]
    if table.published:
        title = _latex(published_title(table.published))
        parts += [r"\par\medskip", rf"\textit{{{title}}}\par\smallskip", _latex_block(as_table(table.published))]
        parts += [rf"\par\smallskip {{\footnotesize {_latex(' '.join(table.published.notes))}}}"]
    notes = r"\par ".join(_latex(note) for note in all_notes(table))
    parts += [r"\par\smallskip", rf"\begin{{minipage}}{{\linewidth}}\footnotesize {notes}\end{{minipage}}"]
    return "\n".join([*parts, r"\end{table}"]) + "\n"


def to_csv(table: Table) -> str:
    """One line per row, unrounded; published rows have the status "published".

    A metric may have three additional columns: _std over seeds, _low and _high of its 95 % interval.
    """
    rows = table.rows + (table.published.rows if table.published else [])
    measured = unique([c.name for c in table.columns] + [name for row in rows for name in row.cells])
    names = [name for name in measured if name not in table.axes]
    lines = [_csv_line(row, table.axes, names) for row in rows]
    heads = [h for h in lines[0] if any(line[h] not in (None, "") for line in lines) or h in names]
    out = io.StringIO()
    writer = csv.DictWriter(out, heads, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _csv_line(row: Row, axes: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    line: dict[str, Any] = dict(zip(axes, _labels(row, axes), strict=True))
    line |= {"status": row.status, "seeds": " ".join(map(str, row.seeds))}
    for name in names:
        numbers = [_or_words(name, number) for number in _numbers(row.cells.get(name))]
        line |= zip([name, f"{name}_std", f"{name}_low", f"{name}_high"], numbers, strict=True)
    runs = unique(run for cell in row.cells.values() for run in cell.run_ids)
    return line | {"run_ids": " ".join(runs), "commits": " ".join(row.commits), "errors": "; ".join(row.errors)}


def to_json(table: Table) -> str:
    """The whole table, each cell with its run ids; NaN and infinity are null."""
    return json.dumps(_plain(_tree(table)), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write(table: Table, folder: Path | str, name: str = "table") -> list[Path]:
    """Write name.md, .tex, .csv and .json, and return the paths."""
    texts = {".md": to_markdown(table), ".tex": to_latex(table), ".csv": to_csv(table), ".json": to_json(table)}
    for ending, text in texts.items():
        write_text(Path(folder, name + ending), text)
    return [Path(folder, name + ending) for ending in texts]


def _cell_text(column: Column, cell: Cell) -> str:
    text = column.text
    if cell.std:
        return f"{text(cell.mean)} ± {_spread(column, cell)}"
    if cell.interval and shows_interval(column, cell):
        return f"{text(cell.mean)} [{text(cell.interval[0])}, {text(cell.interval[1])}]"
    return text(cell.mean)


def _spread(column: Column, cell: Cell) -> str:
    """The standard deviation with as many decimals as the mean."""
    _, _, decimals = column.text(cell.mean).partition(".")
    return f"{cell.std:.{len(decimals)}f}"


class Body(NamedTuple):
    """The texts of a table before escaping."""

    heads: list[str]
    rows: list[list[str]]
    bold: set[tuple[int, int]]
    labels: int  # number of leading text columns


def body_of(table: Table, marked: bool) -> Body:
    """Texts of a table; `marked` adds the numbers of error notes, and seed counts if rows differ in them.

    A column is followed by the published one if a row of the same label has a published number.
    """
    uneven = len({row.seeds for row in table.rows if row.seeds}) > 1
    counted = ["Seeds"] if marked and uneven else []
    heads = [words(axis) if axis != "label" else "" for axis in table.axes] + counted
    numbers = _error_numbers(table) if marked else {}
    rows, places = [], _places(table)
    for row in table.rows:
        labels = _labels(row, table.axes)
        labels[-1] += f" {numbers[row.label]}" if row.label in numbers else ""
        rows.append(labels + [str(len(row.seeds))] * len(counted) + [_place_text(table, p, row) for p in places])
    titles = [f"{_published_column(p.column).title}, published" if p.published else p.column.title for p in places]
    return Body(heads + titles, rows, _bold(table, len(heads)), len(heads))


def cells_of(table: Table) -> list[list[Cell | None]]:
    """The numbers behind the texts of `body_of` after its labels."""
    return [
        [_published_cell(table, row, p.column) if p.published else row.cells.get(p.column.name) for p in _places(table)]
        for row in table.rows
    ]


class _Place(NamedTuple):
    """A column of the body: our numbers, or the published ones of the same metric."""

    column: Column
    published: bool


def _places(table: Table) -> list[_Place]:
    """Each column, followed by its published counterpart if any row has a number in it."""
    theirs = {c.name for c in table.columns for row in table.rows if _published_cell(table, row, c)}
    return [_Place(c, p) for c in table.columns for p in (False, True) if not p or c.name in theirs]


def _published_cell(table: Table, row: Row, column: Column) -> Cell | None:
    return table.published.cell(row.label, column.published or column.name) if table.published else None


def _published_column(ours: Column) -> Column:
    return column(ours.published) if ours.published else ours


def _place_text(table: Table, place: _Place, row: Row) -> str:
    cell = _published_cell(table, row, place.column) if place.published else row.cells.get(place.column.name)
    if cell is None:
        return HOLE
    if place.published:
        return _cell_text(replace(place.column, printed=True), cell)
    mark = table.differences.get(row.label, {}).get(place.column.name, {}).get("mark", "")
    return f"{_cell_text(place.column, cell)} {mark}".strip()


def _bold(table: Table, start: int) -> set[tuple[int, int]]:
    """(row, column) of our best cells; published numbers were measured under other conditions and are not compared."""
    ours = [(j, place.column) for j, place in enumerate(_places(table), start) if not place.published]
    return {(i, j) for j, column in ours for i in significance.best(table.rows, column)}


def _error_numbers(table: Table) -> dict[str, str]:
    """row -> the number of its error among the notes."""
    return {row.label: f"[{i}]" for i, row in enumerate((r for r in table.rows if r.errors), start=1)}


def all_notes(table: Table) -> list[str]:
    numbers = _error_numbers(table)
    errors = [f"{numbers[row.label]} {'; '.join(row.errors)}" for row in table.rows if row.errors]
    bold = ["Bold: the best of a column."] if any(significance.best(table.rows, c) for c in table.columns) else []
    return errors + bold + table.notes


def as_table(published: Published) -> Table:
    columns, _ = choose([], published.rows)
    printed = [replace(c, interval=False, better=None, printed=True) for c in columns]
    return Table("", ["label"], printed, published.rows, [])


def published_title(published: Published) -> str:
    return f"Published, not measured here: {published.title} ({published.source})"


def markdown_block(table: Table, marked: bool = False) -> str:
    """The table alone in Markdown."""
    body = body_of(table, marked)
    rule = [":--"] * body.labels + ["--:"] * (len(body.heads) - body.labels)
    rows = [
        [f"**{markdown_text(text)}**" if (i, j) in body.bold else markdown_text(text) for j, text in enumerate(row)]
        for i, row in enumerate(body.rows)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [[markdown_text(h) for h in body.heads], rule, *rows])


def _latex_block(table: Table, marked: bool = False) -> str:
    body = body_of(table, marked)
    rows = [
        [rf"\textbf{{{_latex(text)}}}" if (i, j) in body.bold else _latex(text) for j, text in enumerate(row)]
        for i, row in enumerate(body.rows)
    ]
    wide = len(body.heads) > 8
    spec = "l" * body.labels + "r" * (len(body.heads) - body.labels)
    lines = [rf"\begin{{tabular}}{{@{{}}{spec}@{{}}}}", r"\toprule", _latex_line(map(_latex, body.heads)), r"\midrule"]
    text = "\n".join([*lines, *map(_latex_line, rows), r"\bottomrule", r"\end{tabular}"])
    return rf"\resizebox{{\linewidth}}{{!}}{{{text}}}" if wide else text


def _latex_line(cells: Iterable[str]) -> str:
    return " & ".join(f"{{{cell}}}" if cell.startswith("[") else cell for cell in cells) + r" \\"


LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "±": r"$\pm$", "\u00d7": r"$\times$", "→": r"$\rightarrow$",
    "↑": r"$\uparrow$", "↓": r"$\downarrow$", "▲": r"$^{+}$", "▼": r"$^{-}$", "≠": r"$^{\neq}$", "†": r"$^{\dagger}$",
    "≤": r"$\leq$", "≥": r"$\geq$",
    "—": "---", "\u2013": "--", "…": r"\ldots{}",
}  # fmt: skip


def _latex(text: str) -> str:
    return "".join(LATEX.get(letter, letter) for letter in " ".join(text.split()))


def markdown_text(text: str) -> str:
    """Text in one line that Markdown shows as it is."""
    return re.sub(r"([\\|*_<>`])", r"\\\1", " ".join(text.split()))


def _labels(row: Row, axes: Sequence[str]) -> list[str]:
    """A row's label on each axis, or its single label followed by blanks."""
    return [row.labels.get(axis, "") for axis in axes] if row.labels else [row.label] + [""] * (len(axes) - 1)


def _numbers(cell: Cell | None) -> list[float | None]:
    if cell is None:
        return [None] * 4
    return [cell.mean, cell.std, *(cell.interval or (None, None))]


def _or_words(name: str, number: float | None) -> float | str | None:
    """A number of a column, or the words that stand for its 0."""
    return column(name).zero if number == 0 and column(name).zero else number


def _tree(table: Table) -> dict[str, Any]:
    published = table.published and {
        "title": table.published.title,
        "source": table.published.source,
        "notes": table.published.notes,
        "rows": [_row_tree(row) for row in table.published.rows],
    }
    tree = {"title": table.title, "axes": table.axes, "columns": [asdict(c) for c in table.columns]}
    rows = [_row_tree(r) for r in table.rows]
    tested = {"differences": table.differences, "verdicts": table.verdicts}
    return tree | {"rows": rows, "notes": all_notes(table), "published": published, **tested}


def _row_tree(row: Row) -> dict[str, Any]:
    return row._asdict() | {"cells": {name: cell._asdict() for name, cell in row.cells.items()}}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
