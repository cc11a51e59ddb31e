"""The verb `parts`: kinds, parts, options and sections as aligned tables in the terminal."""

import inspect
import shutil
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sana_lab.config import options, registry, specs
from sana_lab.config.validation import SpecError, nearest


def main(kind: str | None = None, name: str | None = None) -> None:
    """`sana-lab parts`, `parts KIND`, `parts SECTION`, `parts KIND NAME`. SpecError with the nearest name."""
    if kind is None:
        print_table("Kinds of parts: sana-lab parts KIND", sorted(registry.KINDS.items()))
        sections = [(n, options.first_sentence(record.__doc__ or "")) for n, record in options.SECTIONS.items()]
        print_table("Sections of YAML files: sana-lab parts SECTION", sections)
    elif kind in options.SECTIONS and name is None:
        doc = inspect.getdoc(options.SECTIONS[kind]) or ""
        print_table(doc, options.describe_section(kind), ("option", "type", "default", "meaning"))
    elif kind not in registry.TABLE:
        raise SpecError(f"no kind of part is called {kind!r}; {nearest(kind, [*registry.TABLE, *options.SECTIONS])}")
    elif name is None:
        print_table(f"{kind}: {registry.KINDS[kind]}", [(n, options.summary(kind, n)) for n in registry.TABLE[kind]])
        if presets := specs.presets(kind):
            print_table("Presets, used by name like a part", [(n, options.preset_summary(kind, n)) for n in presets])
    else:
        rows = options.describe_part(kind, name)
        doc = options.first_sentence(inspect.getdoc(specs.find(kind, name)) or "")
        print_table(f"{kind} {name}: {doc}", rows, ("option", "type", "default", "meaning"))


def print_table(title: str, rows: Sequence[Sequence[str]], columns: Sequence[str] = ("name", "what it is")) -> None:
    """A title and a table of plain text that wraps its last column to the terminal's width."""
    console = Console(width=shutil.get_terminal_size((100, 24)).columns, highlight=False, soft_wrap=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, no_wrap=i == 0, overflow="fold", ratio=1 if i == len(columns) - 1 else None)
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(Text(f"\n{title}\n"))
    console.print(table if rows else Text("no options"))
