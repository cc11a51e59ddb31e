"""Specs of parts: find, complete and check, build, and reduce to what identifies them.

A *part* is a callable whose signature is its only schema. A *spec* is plain data, a name and options:
`"linear"`, or `{"name": "linear", "eps": 1e-8}`. Positional-only parameters and keyword-only parameters without a
default are supplied by code (a DiT tells its attention the width); every other parameter is an option that a spec
may set. An inner part is marked in the signature: `ffn: Annotated[Spec, "ffn"] = "mix"`.
"""

import dataclasses
import functools
import importlib
import inspect
import typing
from collections.abc import Callable
from copy import deepcopy
from dataclasses import is_dataclass
from typing import Annotated, Any, NamedTuple, get_args, get_origin

from sana_lab.config.memo import reuse
from sana_lab.config.registry import BASES, LEADING, PRESETS, RENAMED, TABLE, WEIGHTED
from sana_lab.config.validation import (
    SpecError,
    Written,
    admits_list,
    bare,
    describe,
    is_optional,
    kind_of,
    nearest,
    opened,
    typed,
    validate,
)

Spec = str | dict[str, Any]

PartOf = Callable[[str, str], dict[str, Any]]
"""(`experiment:NAME`, kind) -> the spec of that kind in the experiment: `config.experiments.part_of`."""


class Runtime:
    """Marks an option that changes how fast, not what: `Annotated[int, RUNTIME]`. It enters no hash."""


RUNTIME = Runtime()


class Pattern:
    """Marks an option whose list of specs repeats: `Annotated[Spec | list[Spec], "attention", PATTERN]`.

    Lists that repeat to the same layers resolve to the shortest of them, so that equal stacks have one hash.
    """


PATTERN = Pattern()


class AsBefore(NamedTuple):
    """Marks an option added later: at this value it is omitted from the hash, so that earlier models keep theirs."""

    value: Any

    def __hash__(self) -> int:
        """Of the value's text, as it may be a list: annotations are keys of caches."""
        return hash(repr(self.value))


class Option(NamedTuple):
    """One parameter of a part that a spec may set."""

    annotation: Any
    default: Any  # inspect.Parameter.empty if it must be given

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty

    @property
    def kind(self) -> str | None:
        """The kind of part that the option holds; None for plain data."""
        return kind_of(self.annotation)

    def marks(self, mark: type) -> list[Any]:
        """The marks of one class in the annotation, such as AsBefore."""
        marks = get_args(self.annotation)[1:] if get_origin(self.annotation) is Annotated else ()
        return [m for m in marks if isinstance(m, mark)]


def find(kind: str, name: str) -> Callable[..., Any]:
    """The callable behind a registered name, a preset or a user's own `module:attribute`. SpecError if of another kind.

    Nothing is built: importing the module is all that runs. A name that a file brings is refused (`config.guests`).
    """
    if kind not in TABLE:
        raise SpecError(f"no kind of part is called {kind!r}; {nearest(kind, TABLE)}")
    name = presets(kind).get(name, {}).get("name", name)
    if ":" not in name and name not in TABLE[kind]:
        raise SpecError(f"no {kind} is called {name!r}; {nearest(name, [*TABLE[kind], *presets(kind)])}")
    target = _import(TABLE[kind][name]) if name in TABLE[kind] else _guest(kind, name)
    _check_kind(kind, name, target)
    return target


def base_of(kind: str) -> Any:
    """The interface that parts of a kind inherit; of kinds that are classes."""
    return _import(BASES[kind])


def presets(kind: str) -> dict[str, dict[str, Any]]:
    """The presets of a kind: name -> spec."""
    return _import(PRESETS[kind]) if kind in PRESETS else {}


def options(kind: str, target: Callable[..., Any]) -> dict[str, Option]:
    """The options of a part by name, in the order of its signature."""
    return dict(_options(kind, target))


@functools.lru_cache(maxsize=1024)
def _options(kind: str, target: Callable[..., Any]) -> dict[str, Option]:
    hints = _hints(target)
    leading = LEADING.get(kind, ())
    return {
        p.name: Option(hints.get(p.name, Any), p.default)
        for p in inspect.signature(target).parameters.values()
        if _settable(p) and p.name not in leading
    }


def fields(record: type) -> dict[str, Option]:
    """The options of a dataclass."""
    factories = {
        f.name: f.default_factory() for f in dataclasses.fields(record) if f.default_factory is not dataclasses.MISSING
    }
    return {k: o._replace(default=factories.get(k, o.default)) for k, o in options("", record).items()}


def name_of(spec: Spec) -> str:
    """The name in a spec of either form; '' if a mapping has none."""
    return spec if isinstance(spec, str) else spec.get("name", "")


def resolve(kind: str, spec: Spec, where: str = "", part_of: PartOf | None = None) -> dict[str, Any]:
    """The spec completed with every default, inner specs included, and checked against the signatures. SpecError.

    `where` is the path in error messages. `part_of` looks up `experiment:NAME`; `config.experiments.resolve` gives it.
    """
    return reuse(("resolve", kind, spec, part_of is None), lambda: _resolve(kind, spec, where or kind, part_of))


def _resolve(kind: str, spec: Spec, where: str, part_of: PartOf | None) -> dict[str, Any]:
    values = _as_mapping(kind, spec, where)
    if preset := presets(kind).get(values["name"]):
        values = {**deepcopy(preset), **values, "name": preset["name"]}
    name = values.pop("name")
    if name.startswith("experiment:"):
        return _from_experiment(kind, name, values, where, part_of)
    weights = _weights(kind, values, where)
    target = find(kind, name)
    schema = options(kind, target)
    return {"name": name, **complete(schema, values, f"{kind} {name!r}", where, part_of), **weights}


def complete(
    schema: dict[str, Option], values: dict[str, Any], title: str, where: str, part_of: PartOf | None = None
) -> dict[str, Any]:
    """`values` checked against `schema` and completed with its defaults, as plain data. SpecError."""
    for key in values:
        if key not in schema:
            raise SpecError(f"{title} has no option {key!r}; {nearest(key, schema)}  [{where}.{key}]")
    for key, option in schema.items():
        if option.required and key not in values:
            raise SpecError(f"{title} needs {key!r} ({describe(option.annotation)})  [{where}.{key}]")
    return {k: check(_value(k, o, values), o.annotation, f"{where}.{k}", part_of) for k, o in schema.items()}


def check(value: Any, annotation: Any, where: str, part_of: PartOf | None = None) -> Any:
    """`value` of the annotated type as plain data, specs resolved and dataclasses completed. SpecError."""
    if kind := kind_of(annotation):
        return _check_specs(kind, value, annotation, where, part_of)
    if is_dataclass(bare(annotation)):
        return _check_record(opened(value), bare(annotation), where, part_of)
    value, annotation = validate(value, annotation, where), bare(annotation)
    inner = get_args(annotation)
    if get_origin(annotation) is list:
        return [check(v, inner[0], f"{where}[{i}]", part_of) for i, v in enumerate(value)]
    if get_origin(annotation) is dict:
        return {k: check(v, inner[1], f"{where}.{k}", part_of) for k, v in value.items()}
    return value


def build(kind: str, spec: Spec, **supplied: Any) -> Any:
    """The part that a spec names, untrained; a function gets its options bound. SpecError.

    `checkpoints.build.build` also loads the weights that a spec names.
    """
    resolved = resolve(kind, spec)
    weighted = kind in WEIGHTED
    arguments = {k: v for k, v in resolved.items() if k != "name" and not (weighted and k == "weights")}
    target = find(kind, resolved["name"])
    if not inspect.isclass(target):
        return functools.partial(target, **arguments, **supplied)
    part: Any = target(**arguments, **supplied)
    if weighted:
        part.spec = resolved
    return part


def canonical(kind: str, spec: Spec) -> dict[str, Any]:
    """Identity of a part for hashing: resolved, without runtime options and options at their as-before value."""
    return reuse(("canonical", kind, spec), lambda: _canonical(kind, spec))


def _canonical(kind: str, spec: Spec) -> dict[str, Any]:
    resolved = resolve(kind, spec)
    target = find(kind, resolved["name"])
    settings = _canonical_options(options(kind, target), resolved)
    version = getattr(target, "version", 1)
    extra = {"version": version} if version != 1 else {}
    return {"name": resolved["name"], **settings, **{k: resolved[k] for k in ("weights",) if k in resolved}, **extra}


def _guest(kind: str, name: str) -> Any:
    from sana_lab.config import guests  # here, as every module imports this one

    return guests.load(name, kind)


def _import(target: str) -> Any:
    """What the registry names."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _check_kind(kind: str, name: str, target: Any) -> None:
    base = BASES.get(kind)
    if base is None:
        if not callable(target) or inspect.isclass(target) or _leading(target) != LEADING[kind]:
            raise SpecError(f"{name!r} is no {kind}: expected a function that begins ({', '.join(LEADING[kind])}, ...)")
        return
    if not inspect.isclass(target) or not issubclass(target, _import(base)):
        raise SpecError(f"{name!r} is no {kind}: expected a subclass of {base.replace(':', '.')}")
    if missing := sorted(getattr(target, "__abstractmethods__", ())):
        raise SpecError(f"{name!r} is no complete {kind}: it lacks {', '.join(missing)} of {base.replace(':', '.')}")


def _leading(target: Callable[..., Any]) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(target).parameters)[:3]
    except ValueError:
        return ()


def _settable(p: inspect.Parameter) -> bool:
    if p.kind is p.KEYWORD_ONLY:
        return p.default is not p.empty
    return p.kind is p.POSITIONAL_OR_KEYWORD


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    source = target.__init__ if inspect.isclass(target) and not is_dataclass(target) else target
    try:
        return typing.get_type_hints(source, include_extras=True)
    except NameError:  # a guest's annotations that do not resolve at run time are not checked
        return {}


def _as_mapping(kind: str, spec: Any, where: str) -> dict[str, Any]:
    spec = typed(spec, Annotated[Spec, kind])
    if isinstance(spec, str) and spec:
        return {"name": spec}
    if isinstance(spec, dict) and isinstance(spec.get("name"), str | Written):
        given = {**spec, "name": str(spec["name"])}
        for old in given.keys() & RENAMED.get(kind, {}).keys():
            given[RENAMED[kind][old]] = given.pop(old)
        return given
    raise SpecError(
        f"{where} is {spec!r}, expected a name or a mapping with a 'name'; {nearest('', TABLE.get(kind, {}))}"
    )


def _value(key: str, option: Option, values: dict[str, Any]) -> Any:
    """The given value, or the default; a mapping without a name holds options of the default part."""
    default = deepcopy(option.default)
    value = values.get(key, default)
    value = opened(value) if option.kind else value
    if option.kind and isinstance(value, dict) and "name" not in value and isinstance(default, str | dict):
        return {**({"name": default} if isinstance(default, str) else default), **value}
    return value


def _weights(kind: str, values: dict[str, Any], where: str) -> dict[str, str]:
    """The `weights` of a spec, removed from `values`; {} if there are none."""
    value = values.pop("weights", None) if kind in WEIGHTED else None
    return {} if value is None else {"weights": validate(value, str, f"{where}.weights")}


def _from_experiment(
    kind: str, name: str, values: dict[str, Any], where: str, part_of: PartOf | None
) -> dict[str, Any]:
    if kind not in WEIGHTED:
        raise SpecError(f"{where} is {name!r}, but only {', '.join(WEIGHTED)} can be taken from an experiment")
    if part_of is None:
        raise SpecError(f"{where} is {name!r}, expected a part by its name; sana_lab.build looks up experiments")
    return resolve(kind, {**part_of(name, kind), **values, "weights": values.get("weights", name)}, where, part_of)


def _check_specs(kind: str, value: Any, annotation: Any, where: str, part_of: PartOf | None) -> Any:
    """A spec, or a list of them where the annotation admits one. A list of one is that spec, an empty one is null."""
    several = typed(value, annotation)
    if isinstance(several, list | tuple) and admits_list(annotation) and (several or is_optional(annotation)):
        resolved = [resolve(kind, each, f"{where}[{i}]", part_of) for i, each in enumerate(several)]
        resolved = _shortest(resolved) if PATTERN in get_args(annotation) else resolved
        return resolved if len(resolved) > 1 else next(iter(resolved), None)
    return None if several is None and is_optional(annotation) else resolve(kind, value, where, part_of)


def _shortest(specs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The shortest pattern whose repetition is the list."""
    lengths = (n for n in range(1, len(specs) + 1) if len(specs) % n == 0)
    return specs[: next(n for n in lengths if specs == specs[:n] * (len(specs) // n))]


def _check_record(value: Any, record: Any, where: str, part_of: PartOf | None) -> dict[str, Any]:
    value = {} if value is inspect.Parameter.empty or value is None else value
    if is_dataclass(value) and not isinstance(value, type):
        value = vars(value)
    if not isinstance(value, dict):
        raise SpecError(f"{where} is {value!r}, expected a mapping of {', '.join(fields(record))}")
    given = value
    return reuse(
        ("record", record, given, part_of is None),
        lambda: complete(fields(record), given, where, where, part_of),
    )


def _canonical_options(schema: dict[str, Option], resolved: dict[str, Any]) -> dict[str, Any]:
    settings = {}
    for key, option in schema.items():
        before = option.marks(AsBefore)
        if option.marks(Runtime) or (before and before[0].value == resolved[key]):
            continue
        settings[key] = _canonical_specs(option.kind, resolved[key]) if option.kind else resolved[key]
    return settings


def _canonical_specs(kind: str, value: Any) -> Any:
    """The identity of a spec, of each in a list, or of null."""
    if isinstance(value, list):
        return [canonical(kind, each) for each in value]
    return None if value is None else canonical(kind, value)
