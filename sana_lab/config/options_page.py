"""docs/options.md: every part, section and option. `python -m sana_lab.config.options_page` writes it."""

import inspect
from collections.abc import Iterable
from pathlib import Path

from sana_lab.config import options, registry, specs

PAGE = Path(__file__).parents[2] / "docs" / "options.md"

HEAD = """# Options

Every part and every section of an experiment. This page is generated from the comments in the source by `make docs`;
`sana-lab parts KIND NAME` shows the same in a terminal.

An option that is marked *in no hash* changes how a run is computed, not what: runs that differ only in it are the same
run. One that is marked *in no hash at X* was added later: at X, hashes are those from before it existed.
"""


def page() -> str:
    """The text of docs/options.md."""
    sections = [_section(f"`{n}`", r.__doc__ or "", options.describe_section(n)) for n, r in options.SECTIONS.items()]
    kinds = [_kind(kind) for kind in registry.TABLE]
    return "\n".join([HEAD, "## Sections of YAML files\n", *sections, *kinds]).rstrip() + "\n"


def _kind(kind: str) -> str:
    parts = []
    for name in registry.TABLE[kind]:
        doc = options.first_sentence(inspect.getdoc(specs.find(kind, name)) or "")
        parts.append(_section(f"{kind} `{name}`", f"{doc}.", options.describe_part(kind, name)))
    presets = [f"- `{name}`: {options.preset_summary(kind, name)}" for name in specs.presets(kind)]
    listed = ["Presets, used by name like a part:\n", *presets, ""] if presets else []
    return "\n".join([f"## {kind}\n", f"{registry.KINDS[kind].capitalize()}.\n", *parts, *listed])


def _section(title: str, doc: str, rows: Iterable[options.Row]) -> str:
    table = [f"| `{r.name}` | {_escaped(r.type)} | {_code(r.default)} | {_escaped(r.meaning)} |" for r in rows]
    head = ["| option | type | default | meaning |", "|---|---|---|---|"] if table else ["No options."]
    return "\n".join([f"### {title}\n", f"{' '.join(doc.split())}\n", *head, *table, ""])


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _code(text: str) -> str:
    return f"`{_escaped(text)}`" if text else ""


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
    print(PAGE)
