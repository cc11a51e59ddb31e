"""The rules of a kind, run on a part: `sana-lab check`."""

import inspect
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sana_lab.config import options, registry, schema, specs, validation
from sana_lab.config.guests import load
from sana_lab.config.specs import SpecError
from sana_lab.config.validation import bare, nearest
from sana_lab.contracts import (
    Rule,
    Subject,
    Violation,
    evaluation,
    layers,
    methods,
    networks,
    rule_name,
    solvers,
    training,
)

RULES: dict[str, tuple[Rule, ...]] = {
    "attention": layers.RULES,
    "ffn": layers.RULES,
    "dit": networks.DIT,
    "autoencoder": networks.AUTOENCODER,
    "text_encoder": networks.TEXT_ENCODER,
    "solver": solvers.RULES,
    "optimizer": training.OPTIMIZER,
    "method": methods.METHOD,
    "data": training.DATA_MODULE,
    "system": training.SYSTEM,
    "extractor": evaluation.EXTRACTOR,
    "measure": evaluation.MEASURE,
    "detector": evaluation.DETECTOR,
    "vqa": evaluation.VQA,
}
"""kind -> its contract; a kind without one is checked for its methods and options alone."""

WIDTH = 64
"""Width of the tokens that attentions and feed-forward layers are checked at, if their head width divides it."""


class Finding(NamedTuple):
    """A rule and how the part breaks it; None where it keeps it."""

    rule: str
    problem: str | None


def check(kind: str, spec: specs.Spec) -> list[Finding]:
    """Every rule of the kind on a part of that spec. SpecError for a spec that does not resolve."""
    resolved = specs.resolve(kind, spec)
    findings = [_finding(rule, Subject(kind, resolved, supplied(kind, resolved))) for rule in RULES.get(kind, ())]
    return [Finding("It is complete, and its options are annotated", _unannotated(kind, resolved)), *findings]


def supplied(kind: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Tiny stand-ins of what code supplies to a part of the kind."""
    if kind in ("attention", "ffn"):
        head = spec.get("head_dim")
        return {"dim": WIDTH if not isinstance(head, int) or WIDTH % head == 0 else 2 * head}
    return {"channels": 4, "text_dim": 12} if kind == "dit" else {}


def kind_of(name: str) -> str:
    """The kind of a user's `module:attribute`. SpecError with the methods that are missing, or the kinds there are."""
    from sana_lab.models.attention import Attention  # imports torch

    target = load(name, "part")
    if inspect.isfunction(target):
        return "solver"
    if not inspect.isclass(target):
        raise SpecError(f"{name!r} is a {type(target).__name__}, expected a class or, for a solver, a function")
    bases = {kind: specs.base_of(kind) for kind in registry.BASES}
    kinds = [kind for kind, base in bases.items() if issubclass(target, base)]
    if kinds:
        return min(kinds, key=lambda kind: target.__mro__.index(bases[kind]))
    interfaces = [*bases.values(), Attention]  # the usual interface of mixers, which have a wider one
    base = max(interfaces, key=lambda b: len(getattr(b, "__abstractmethods__", frozenset()) & vars(target).keys()))
    abstract: frozenset[str] = getattr(base, "__abstractmethods__", frozenset())
    alike = abstract & vars(target).keys()
    near = f"; its method {sorted(alike)[0]!r} is that of {base.__module__}.{base.__qualname__}" if alike else ""
    raise SpecError(f"{name!r} is a subclass of no interface ({', '.join(registry.BASES)}){near}")


def guests(experiment: schema.Config) -> Iterator[tuple[str, schema.Config]]:
    """(kind, resolved spec) of every part of the user's own in a resolved experiment."""
    yield from _guests_in(specs.fields(schema.Experiment), experiment)


def _guests_in(schema_of: Mapping[str, specs.Option], values: schema.Config) -> Iterator[tuple[str, schema.Config]]:
    for key, option in schema_of.items():
        yield from _guests_of(option.kind, option.annotation, values.get(key))


def _guests_of(kind: str | None, annotation: Any, value: Any) -> Iterator[tuple[str, schema.Config]]:
    if kind and isinstance(value, list):
        for entry in value:
            yield from _guests_of(kind, annotation, entry)
    elif kind and isinstance(value, dict) and isinstance(value.get("name"), str):
        if ":" in value["name"] and not value["name"].startswith("experiment:"):
            yield kind, value
        yield from _guests_in(specs.options(kind, specs.find(kind, value["name"])), value)
    elif isinstance(value, list):
        inner = (*getattr(bare(annotation), "__args__", ()), Any)[0]
        for entry in value:
            yield from _guests_of(validation.kind_of(inner), inner, entry)
    elif is_dataclass(bare(annotation)) and isinstance(value, dict):
        yield from _guests_in(specs.fields(bare(annotation)), value)


def _finding(rule: Rule, subject: Subject) -> Finding:
    try:
        rule(subject)
    except Violation as error:
        return Finding(rule_name(rule), str(error))
    except Exception as error:  # whatever the part does is a finding
        return Finding(rule_name(rule), describe(error, subject))
    return Finding(rule_name(rule), None)


def describe(error: Exception, subject: Subject) -> str:
    """An error in one line, with the line of the part's own file that it came through."""
    return f"{type(error).__name__}: {_first_line(error)}{_place(error, subject)}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def _place(error: Exception, subject: Subject) -> str:
    """The last line of the part's own file that the error came through."""
    try:
        own = inspect.getsourcefile(specs.find(subject.kind, subject.spec["name"]))
    except TypeError:
        return ""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == own]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno}: {frames[-1].line})" if frames else ""


def _unannotated(kind: str, spec: Mapping[str, Any]) -> str | None:
    given = specs.options(kind, specs.find(kind, spec["name"]))
    bare_names = [key for key, option in given.items() if option.annotation is Any]
    return f"no type beside {', '.join(bare_names)}, so that any value would pass" if bare_names else None


def unexplained(kind: str, name: str) -> list[str]:
    """Options without a comment beside them, which `sana-lab parts` would show without a meaning."""
    return [row.name for row in options.describe_part(kind, name) if not row.meaning]


def nearest_kind(word: str) -> str:
    """A did-you-mean clause for a kind of part."""
    return nearest(word, RULES)
