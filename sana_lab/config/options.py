"""Descriptions of parts and sections for people: each option's name, type, default and meaning.

Types and defaults come from the signature; the meaning is the comment beside an option in the source, at the end of its
line or on the lines directly above it. The verb `parts` and docs/options.md show them.
"""

import ast
import inspect
import io
import textwrap
import tokenize
import types
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from sana_lab.config import registry, schema, specs
from sana_lab.config.validation import SpecError, admits_list, kind_of, nearest, range_words

SECTIONS: dict[str, type] = {
    "experiment": schema.Experiment,
    "trainer": schema.TrainerOptions,
    "parent": schema.ParentOptions,
    "sampling": schema.SamplingOptions,
    "eval": schema.EvaluationOptions,
    "ablation": schema.Ablation,
    "efficiency": schema.EfficiencyTable,
    "expect": schema.Expectation,
    "samples": schema.Samples,
    "range": schema.Range,
    "match": schema.Match,
}
"""Sections of `experiments/*.yaml`, and what `ablations/*.yaml` may say."""

WEIGHTS = ("weights", "text | null", "null", "weights to load: a file or folder, a hub id, or experiment:NAME")


class Row(NamedTuple):
    """One option in words."""

    name: str
    type: str
    default: str  # "required" if it must be given
    meaning: str  # "" if the source has no comment


# rows


def describe_part(kind: str, name: str) -> list[Row]:
    """The options of a part, of a preset or of a user's `module:attribute`. SpecError with the nearest name."""
    target = specs.find(kind, name)
    schema_of = specs.options(kind, target)
    preset = specs.presets(kind).get(name, {})
    schema_of = {k: o._replace(default=preset.get(k, o.default)) for k, o in schema_of.items()}
    weights = [Row(*WEIGHTS)] if kind in registry.WEIGHTED else []
    return _rows(schema_of, comments(target), foreign_name(target)) + weights


def describe_section(name: str) -> list[Row]:
    """The options of a section of a YAML file. SpecError with the nearest name."""
    if name not in SECTIONS:
        raise SpecError(f"there is no section {name!r}; {nearest(name, SECTIONS)}")
    return _rows(specs.fields(SECTIONS[name]), comments(SECTIONS[name]), None)


def _rows(options: dict[str, specs.Option], meanings: dict[str, str], foreign: str | None) -> list[Row]:
    fallback = f"see {foreign}" if foreign else ""
    return [
        Row(key, type_words(o.annotation), default_words(o), _with_marks(meanings.get(key, fallback), o))
        for key, o in options.items()
    ]


def _with_marks(meaning: str, option: specs.Option) -> str:
    """The meaning, and whether the option enters hashes: RUNTIME and AsBefore in words."""
    if option.marks(specs.Runtime):
        return f"{meaning} [in no hash]".strip()
    before = [yaml_words(mark.value) for mark in option.marks(specs.AsBefore)]
    return f"{meaning} [in no hash at {before[0]}]".strip() if before else meaning


def foreign_name(target: Callable[..., Any]) -> str | None:
    """The public name of a library's part, such as torch.optim.AdamW; None for parts with comments of ours or users."""
    library = target.__module__.partition(".")[0]
    return f"{target.__module__.rpartition('.')[0]}.{target.__name__}" if library == "torch" else None


# words


def type_words(annotation: Any) -> str:
    """A type as the values that YAML may hold: `text | null`, `list of int`, `attention`, `auto | torch | triton`."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if kind := kind_of(annotation):
        several = f" | list of {kind}" if admits_list(annotation) else ""
        optional = " | null" if type(None) in get_args(inner[0]) else ""
        return kind + several + optional
    if origin is Annotated:
        return f"{type_words(inner[0])} {range_words(annotation)}".rstrip()
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin in (Union, types.UnionType):
        return " | ".join(type_words(member) for member in inner)
    if origin is tuple and inner[-1] is not Ellipsis:
        return f"[{', '.join(map(type_words, inner))}]"
    if origin in (list, tuple):
        return f"list of {type_words(inner[0])}"
    if is_dataclass(annotation):
        return next((name for name, record in SECTIONS.items() if record is annotation), "mapping")
    plain = {type(None): "null", str: "text", bool: "true | false", Any: "any"}
    return "mapping" if origin is dict else plain.get(annotation, getattr(annotation, "__name__", str(annotation)))


def default_words(option: specs.Option) -> str:
    """A default as YAML; `required` if there is none; empty for a section, which has its own defaults."""
    return "required" if option.required else "" if is_dataclass(option.default) else yaml_words(option.default)


def yaml_words(value: Any) -> str:
    """Plain data as YAML on one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {yaml_words(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(yaml_words, value)) + "]"
    return str(value) if value != "" else '""'


# comments in the source


def comments(target: Callable[..., Any]) -> dict[str, str]:
    """Option -> the comment beside it in the source of a function, a class's constructor or a dataclass."""
    if is_dataclass(target):
        bases = [base for base in reversed(inspect.getmro(target)) if is_dataclass(base)]
        return {name: text for base in bases for name, text in _comments_in(base).items()}
    return _comments_in(target.__init__ if inspect.isclass(target) else inspect.unwrap(target))


def _comments_in(target: Callable[..., Any]) -> dict[str, str]:
    try:
        source = textwrap.dedent(inspect.getsource(target))
    except (OSError, TypeError):  # built in, or typed at a prompt
        return {}
    lines, trailing = _comment_lines(source)
    spans = list(_spans(ast.parse(source).body[0]))
    beside = {}
    for name, first, last in spans:
        alone = not any(other != name and a <= last and first <= b for other, a, b in spans)
        text = trailing.get(last, "") if alone else ""
        beside[name] = text or _above(lines, first)
    return {name: text for name, text in beside.items() if text}


def _spans(node: ast.AST) -> Iterator[tuple[str, int, int]]:
    """(name, first line, last line) of each parameter or field, default included."""
    if isinstance(node, ast.ClassDef):
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                yield field.target.id, field.lineno, field.end_lineno or field.lineno
    elif isinstance(node, ast.FunctionDef):
        a = node.args
        positional = [*a.posonlyargs, *a.args]
        defaults = [None] * (len(positional) - len(a.defaults)) + list(a.defaults) + list(a.kw_defaults)
        for argument, default in zip([*positional, *a.kwonlyargs], defaults, strict=True):
            yield argument.arg, argument.lineno, (default or argument).end_lineno or argument.lineno


def _comment_lines(source: str) -> tuple[dict[int, str], dict[int, str]]:
    """Comments by line number: on separate lines, and after code."""
    own: dict[int, str] = {}
    trailing: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        text = token.string.lstrip("# ").rstrip()
        if token.type == tokenize.COMMENT and not text.startswith(("type:", "noqa", "fmt:")):
            (own if token.line.lstrip().startswith("#") else trailing)[token.start[0]] = text.partition("  #")[0]
    return own, trailing


def _above(lines: dict[int, str], first: int) -> str:
    top = first
    while top - 1 in lines:
        top -= 1
    return " ".join(lines[i] for i in range(top, first))


# one-line descriptions


def summary(kind: str, name: str) -> str:
    """The first sentence about a registered part, read from its source without importing it."""
    target = registry.TABLE[kind][name]
    module, _, attribute = target.partition(":")
    if not module.startswith("sana_lab."):
        return f"{module}.{attribute}"
    path = Path(__file__).parents[1].joinpath(*module.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    nodes = ast.parse(path.read_text()).body
    node = next(n for n in nodes if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == attribute)
    return first_sentence(ast.get_docstring(node) or "")


def first_sentence(doc: str) -> str:
    """The first sentence of a docstring, without its full stop."""
    paragraph = " ".join(doc.split("\n\n")[0].split())
    return paragraph.partition(". ")[0].rstrip(".")


def preset_summary(kind: str, name: str) -> str:
    """A preset of autoencoders: its part, downsampling and latent channels."""
    spec = specs.resolve(kind, name)
    return f"{spec['name']}, {2 ** (len(spec['widths']) - 1)}x, {spec['latent']} latent channels"
