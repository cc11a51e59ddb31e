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

from sana_lab.table import Cell, Column, Published, Row, Table, choose, shows_interval, unique, words

HOLE = "—"


def to_markdown(table: Table) -> str:
    """A heading, the table, the published table if there is one, and the notes."""
    blocks = [f"### {_markdown(table.title)}", _markdown_block(table, marked=True)]
    if table.published:
        blocks += [f"**{_markdown(_published_title(table.published))}**", _markdown_block(_as_table(table.published))]
    blocks.append("\n".join(f"- {_markdown(note)}" for note in _all_notes(table)))
    return "\n\n".join(blocks) + "\n"


def to_latex(table: Table) -> str:
    """A `table` environment that needs booktabs, and graphicx where it is wide; all text in it is escaped."""
    parts = [
        r"\begin{table}[t]",
        r"\centering",
        rf"\caption{{{_latex(table.title)}}}",
        _latex_block(table, marked=True),
    ]
    if table.published:
        title = _latex(_published_title(table.published))
        parts += [r"\par\medskip", rf"\textit{{{title}}}\par\smallskip", _latex_block(_as_table(table.published))]
    notes = r"\par ".join(_latex(note) for note in _all_notes(table))
    parts += [r"\par\smallskip", rf"\begin{{minipage}}{{\linewidth}}\footnotesize {notes}\end{{minipage}}"]
    return "\n".join([*parts, r"\end{table}"]) + "\n"


def to_csv(table: Table) -> str:
    """A line for each row, unrounded; published rows carry that status.

    A metric may have three more columns: _std over seeds, _low and _high of its 95 % interval.
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
        line |= zip([name, f"{name}_std", f"{name}_low", f"{name}_high"], _numbers(row.cells.get(name)), strict=True)
    runs = unique(run for cell in row.cells.values() for run in cell.run_ids)
    return line | {"run_ids": " ".join(runs), "commits": " ".join(row.commits), "errors": "; ".join(row.errors)}


def to_json(table: Table) -> str:
    """Everything the table knows, each cell with its run ids; not-a-number and infinity are null."""
    return json.dumps(_plain(_tree(table)), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write(table: Table, folder: Path | str, name: str = "table") -> list[Path]:
    """Writes name.md, .tex, .csv and .json; the paths."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    texts = {".md": to_markdown(table), ".tex": to_latex(table), ".csv": to_csv(table), ".json": to_json(table)}
    for ending, text in texts.items():
        Path(folder, name + ending).write_text(text, encoding="utf-8")
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


class _Body(NamedTuple):
    """A table as texts that are not escaped yet."""

    heads: list[str]
    rows: list[list[str]]
    bold: set[tuple[int, int]]
    labels: int  # leading columns that hold words


def _body(table: Table, marked: bool) -> _Body:
    """`marked` numbers the rows that have errors, as the notes do."""
    uneven = len({row.seeds for row in table.rows if row.seeds}) > 1
    counted = ["Seeds"] if marked and uneven else []
    heads = [words(axis) if axis != "label" else "" for axis in table.axes] + counted
    marks = _marks(table) if marked else {}
    rows = []
    for row in table.rows:
        labels = _labels(row, table.axes)
        labels[-1] += f" {marks[row.label]}" if row.label in marks else ""
        numbers = [_cell_text(c, row.cells[c.name]) if c.name in row.cells else HOLE for c in table.columns]
        rows.append(labels + [str(len(row.seeds))] * len(counted) + numbers)
    start = len(heads)
    return _Body(heads + [c.title for c in table.columns], rows, _bold(table, start), start)


def _bold(table: Table, start: int) -> set[tuple[int, int]]:
    best = [table.best(c) for c in table.columns]
    return {
        (i, start + j)
        for i, row in enumerate(table.rows)
        for j, c in enumerate(table.columns)
        if c.name in row.cells and c.text(row.cells[c.name].mean) in best[j]
    }


def _marks(table: Table) -> dict[str, str]:
    return {row.label: f"[{i}]" for i, row in enumerate((r for r in table.rows if r.errors), start=1)}


def _all_notes(table: Table) -> list[str]:
    marks = _marks(table)
    errors = [f"{marks[row.label]} {'; '.join(row.errors)}" for row in table.rows if row.errors]
    bold = ["Bold: the best of a column."] if any(table.best(c) for c in table.columns) else []
    return errors + bold + table.notes


def _as_table(published: Published) -> Table:
    columns, _ = choose([], published.rows)
    return Table("", ["label"], [replace(c, interval=False, better=None) for c in columns], published.rows, [])


def _published_title(published: Published) -> str:
    return f"Published, not measured here: {published.title} ({published.source})"


def _markdown_block(table: Table, marked: bool = False) -> str:
    body = _body(table, marked)
    rule = [":--"] * body.labels + ["--:"] * (len(body.heads) - body.labels)
    rows = [
        [f"**{_markdown(text)}**" if (i, j) in body.bold else _markdown(text) for j, text in enumerate(row)]
        for i, row in enumerate(body.rows)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [[_markdown(h) for h in body.heads], rule, *rows])


def _latex_block(table: Table, marked: bool = False) -> str:
    body = _body(table, marked)
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
    "↑": r"$\uparrow$", "↓": r"$\downarrow$", "≤": r"$\leq$", "≥": r"$\geq$",
    "—": "---", "\u2013": "--", "…": r"\ldots{}",
}  # fmt: skip


def _latex(text: str) -> str:
    return "".join(LATEX.get(letter, letter) for letter in " ".join(text.split()))


def _markdown(text: str) -> str:
    return re.sub(r"([\\|*_<>`])", r"\\\1", " ".join(text.split()))


def _labels(row: Row, axes: Sequence[str]) -> list[str]:
    """A row's label on each axis, or its one label and blanks."""
    return [row.labels.get(axis, "") for axis in axes] if row.labels else [row.label] + [""] * (len(axes) - 1)


def _numbers(cell: Cell | None) -> list[float | None]:
    if cell is None:
        return [None] * 4
    return [cell.mean, cell.std, *(cell.interval or (None, None))]


def _tree(table: Table) -> dict[str, Any]:
    published = table.published and {
        "title": table.published.title,
        "source": table.published.source,
        "rows": [_row_tree(row) for row in table.published.rows],
    }
    tree = {"title": table.title, "axes": table.axes, "columns": [asdict(c) for c in table.columns]}
    return tree | {"rows": [_row_tree(r) for r in table.rows], "notes": _all_notes(table), "published": published}


def _row_tree(row: Row) -> dict[str, Any]:
    return row._asdict() | {"cells": {name: cell._asdict() for name, cell in row.cells.items()}}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
