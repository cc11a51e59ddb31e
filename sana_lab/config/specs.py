"""The table of parts, and what turns a spec into one: find, resolve, build.

A *part* is a callable whose signature is its only schema. A *spec* is plain data, a name and options:
`"linear"`, or `{"name": "linear", "eps": 1e-8}`. Positional-only parameters and keyword-only parameters without a
default are supplied by code (a DiT tells its attention the width); every other parameter is an option that a spec
may set. An inner part is marked in the signature: `attention: Annotated[Spec, "attention"] = "linear"`.
"""

import dataclasses
import difflib
import functools
import importlib
import inspect
import json
import types
import typing
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import is_dataclass
from typing import Annotated, Any, Literal, NamedTuple, TypeGuard, Union, get_args, get_origin

from sana_lab.config.registry import BASES, LEADING, PRESETS, RENAMED, TABLE, WEIGHTED

Spec = str | dict[str, Any]


class SpecError(ValueError):
    """A spec that a person can mend: what was given, what was expected and the nearest right answer."""


class Runtime:
    """Marks an option that changes how fast, not what: `Annotated[int, RUNTIME]`. It enters no hash."""


RUNTIME = Runtime()


class AsBefore(NamedTuple):
    """Marks an option added later: at this value it is left out of the hash, so that earlier models keep theirs."""

    value: Any


class Option(NamedTuple):
    """One parameter of a part that a spec may set."""

    annotation: Any
    default: Any  # inspect.Parameter.empty where it must be given

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty

    def marks(self, mark: type) -> list[Any]:
        found = get_args(self.annotation)[1:] if get_origin(self.annotation) is Annotated else ()
        return [m for m in found if isinstance(m, mark)]


def nearest(word: str, options: Iterable[str]) -> str:
    """A did-you-mean clause, or the list of what there is."""
    names = sorted(options)
    close = difflib.get_close_matches(word, names, 1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"there is: {', '.join(names) or 'nothing'}"


def find(kind: str, name: str) -> Callable[..., Any]:
    """The callable behind a name of the table, or behind a user's own `module:attribute`, if it is of this kind."""
    if kind not in TABLE:
        raise SpecError(f"no kind of part is called {kind!r}; {nearest(kind, TABLE)}")
    name = presets(kind).get(name, {}).get("name", name)
    if ":" not in name and name not in TABLE[kind]:
        raise SpecError(f"no {kind} is called {name!r}; {nearest(name, [*TABLE[kind], *presets(kind)])}")
    target = _import(kind, TABLE[kind].get(name, name))
    _check_kind(kind, name, target)
    return target


def presets(kind: str) -> dict[str, dict[str, Any]]:
    """The known shapes of a kind: name -> the spec that it stands for."""
    return _import(kind, PRESETS[kind]) if kind in PRESETS else {}


def options(kind: str, target: Callable[..., Any]) -> dict[str, Option]:
    """What a spec of this part may say, in the signature's order."""
    hints = _hints(target)
    leading = LEADING.get(kind, ())
    return {
        p.name: Option(hints.get(p.name, Any), p.default)
        for p in inspect.signature(target).parameters.values()
        if _settable(p) and p.name not in leading
    }


def name_of(spec: Spec) -> str:
    return spec if isinstance(spec, str) else spec.get("name", "")


def resolve(kind: str, spec: Spec, where: str = "") -> dict[str, Any]:
    """The spec completed with every default, inner specs included, and checked against the signatures. SpecError."""
    where = where or kind
    given = _as_mapping(kind, spec, where)
    if preset := presets(kind).get(given["name"]):
        given = {**deepcopy(preset), **given, "name": preset["name"]}
    name = given.pop("name")
    if name.startswith("experiment:"):
        return _from_experiment(kind, name, given, where)
    weights = _weights(kind, given, where)
    target = find(kind, name)
    schema = options(kind, target)
    return {"name": name, **complete(schema, given, f"{kind} {name!r}", where), **weights}


def complete(schema: dict[str, Option], given: dict[str, Any], title: str, where: str) -> dict[str, Any]:
    """`given` checked against `schema` and completed with its defaults, as plain data."""
    for key in given:
        if key not in schema:
            raise SpecError(f"{title} has no option {key!r}; {nearest(key, schema)}  [{where}.{key}]")
    for key, option in schema.items():
        if option.required and key not in given:
            raise SpecError(f"{title} needs {key!r} ({_show(option.annotation)})  [{where}.{key}]")
    return {k: check(_value(k, o, given), o.annotation, f"{where}.{k}") for k, o in schema.items()}


def build(kind: str, spec: Spec, **supplied: Any) -> Any:
    """The part that a spec names, its weights loaded where it says `weights`; a function gets its options bound."""
    resolved = resolve(kind, spec)
    weighted = kind in WEIGHTED
    arguments = {k: v for k, v in resolved.items() if k != "name" and not (weighted and k == "weights")}
    target = find(kind, resolved["name"])
    if not inspect.isclass(target):
        return functools.partial(target, **arguments, **supplied)
    part: Any = target(**arguments, **supplied)
    if weighted:
        part.spec = resolved
    if weighted and resolved.get("weights"):
        importlib.import_module("sana_lab.checkpoints.weights").load_into(part, resolved["weights"], kind)
    return part


def canonical(kind: str, spec: Spec) -> dict[str, Any]:
    """What identifies a part to a hash: resolved, without runtime options and options at their as-before value."""
    resolved = resolve(kind, spec)
    target = find(kind, resolved["name"])
    kept = _canonical_options(options(kind, target), resolved)
    version = getattr(target, "version", 1)
    extra = {"version": version} if version != 1 else {}
    return {"name": resolved["name"], **kept, **{k: resolved[k] for k in ("weights",) if k in resolved}, **extra}


def check(value: Any, annotation: Any, where: str) -> Any:
    """`value` as plain data if it fits the annotation (int passes for float); SpecError that says where it does not."""
    if get_origin(annotation) is Annotated:
        inner, *marks = get_args(annotation)
        kind = next((m for m in marks if isinstance(m, str)), None)
        if kind is None:
            return check(value, inner, where)
        if value is None and type(None) in get_args(inner):
            return None
        return resolve(kind, value, where)
    if is_dataclass(annotation):
        return _check_dataclass(value, annotation, where)
    ok, result = _fits(value, annotation, where)
    if not ok:
        raise SpecError(
            f"{where} is {value!r} ({type(value).__name__}), expected {_show(annotation)}{_hint(value, annotation)}"
        )
    return result


def fields(record: type) -> dict[str, Option]:
    """The options of a dataclass."""
    made = {
        f.name: f.default_factory() for f in dataclasses.fields(record) if f.default_factory is not dataclasses.MISSING
    }
    return {k: o._replace(default=made.get(k, o.default)) for k, o in options("", record).items()}


def _import(kind: str, target: str) -> Any:
    module, _, attribute = target.partition(":")
    try:
        return functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise
        raise SpecError(f"{kind} {target!r}: there is no module {error.name!r}") from error
    except AttributeError as error:
        raise SpecError(f"{kind} {target!r}: module {module!r} has no {attribute!r}") from error


def _check_kind(kind: str, name: str, target: Any) -> None:
    base = BASES.get(kind)
    if base is None:
        if not callable(target) or inspect.isclass(target) or _leading(target) != LEADING[kind]:
            raise SpecError(f"{name!r} is no {kind}: expected a function that begins ({', '.join(LEADING[kind])}, ...)")
        return
    if not inspect.isclass(target) or not issubclass(target, _import(kind, base)):
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
    if isinstance(spec, str) and spec:
        return {"name": spec}
    if isinstance(spec, dict) and isinstance(spec.get("name"), str):
        return {RENAMED.get(kind, {}).get(key, key): value for key, value in spec.items()}
    raise SpecError(
        f"{where} is {spec!r}, expected a name or a mapping with a 'name'; {nearest('', TABLE.get(kind, {}))}"
    )


def _value(key: str, option: Option, given: dict[str, Any]) -> Any:
    """What is given, or the default; a mapping without a name holds options of the default part."""
    default = deepcopy(option.default)
    value = given.get(key, default)
    if option.marks(str) and isinstance(value, dict) and "name" not in value and isinstance(default, str | dict):
        return {**({"name": default} if isinstance(default, str) else default), **value}
    return value


def _weights(kind: str, given: dict[str, Any], where: str) -> dict[str, str]:
    """What a part's weights are loaded from, taken out of `given`; null is none."""
    value = given.pop("weights", None) if kind in WEIGHTED else None
    return {} if value is None else {"weights": check(value, str, f"{where}.weights")}


def _from_experiment(kind: str, name: str, given: dict[str, Any], where: str) -> dict[str, Any]:
    if kind not in WEIGHTED:
        raise SpecError(f"{where} is {name!r}, but only {', '.join(WEIGHTED)} can be taken from an experiment")
    spec = importlib.import_module("sana_lab.config.experiments").part_of(name, kind)
    return resolve(kind, {**spec, **given, "weights": given.get("weights", name)}, where)


def _check_dataclass(value: Any, record: Any, where: str) -> dict[str, Any]:
    value = {} if value is inspect.Parameter.empty or value is None else value
    if is_dataclass(value) and not isinstance(value, type):
        value = vars(value)
    if not isinstance(value, dict):
        raise SpecError(f"{where} is {value!r}, expected a mapping of {', '.join(fields(record))}")
    return complete(fields(record), value, where, where)


def _canonical_options(schema: dict[str, Option], resolved: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for key, option in schema.items():
        before = option.marks(AsBefore)
        if option.marks(Runtime) or (before and before[0].value == resolved[key]):
            continue
        kind = next(iter(option.marks(str)), None)
        kept[key] = canonical(kind, resolved[key]) if kind and resolved[key] is not None else resolved[key]
    return kept


def _is_union(origin: Any) -> TypeGuard[Any]:
    return origin is Union or origin is types.UnionType


def _fits(value: Any, annotation: Any, where: str) -> tuple[bool, Any]:
    origin, inner = get_origin(annotation), get_args(annotation)
    if annotation is Any or isinstance(annotation, typing.TypeVar):
        return True, value
    if annotation is None or annotation is type(None):
        return value is None, value
    if origin is Literal:
        return any(value == i and type(value) is type(i) for i in inner), value
    if _is_union(origin):
        return _fits_union(value, inner, where)
    if origin in (list, tuple):
        return _fits_sequence(value, origin, inner, where)
    if origin is dict:
        return _fits_mapping(value, inner, where)
    return _fits_scalar(value, annotation)


def _fits_union(value: Any, members: tuple[Any, ...], where: str) -> tuple[bool, Any]:
    scalars = [m for m in members if m in (int, float, str, bool)]
    for member in [m for m in members if not (scalars and _is_guest(m))]:
        try:
            return True, check(value, member, where)
        except SpecError:
            continue
    return False, value


def _is_guest(member: Any) -> bool:
    """A type of torch's or a user's own (float | Tensor): where plain numbers may stand, no spec can mean it."""
    plain = (int, float, str, bool, dict, list, tuple, type(None))
    return isinstance(member, type) and member not in plain and not is_dataclass(member)


def _fits_sequence(value: Any, origin: Any, inner: tuple[Any, ...], where: str) -> tuple[bool, Any]:
    if not isinstance(value, list | tuple):
        return False, value
    if origin is tuple and inner and inner[-1] is not Ellipsis:
        if len(value) != len(inner):
            return False, value
        return True, [check(v, a, f"{where}[{i}]") for i, (v, a) in enumerate(zip(value, inner, strict=True))]
    item = inner[0] if inner else Any
    return True, [check(v, item, f"{where}[{i}]") for i, v in enumerate(value)]


def _fits_mapping(value: Any, inner: tuple[Any, ...], where: str) -> tuple[bool, Any]:
    if not isinstance(value, dict):
        return False, value
    return True, {k: check(v, inner[1], f"{where}.{k}") for k, v in value.items()}


def _fits_scalar(value: Any, annotation: Any) -> tuple[bool, Any]:
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return True, float(value)
    if annotation in (int, float, str, bool, dict, list):
        return isinstance(value, annotation) and (annotation is bool or not isinstance(value, bool)), value
    return True, value  # a guest's own types are its own business


def _show(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        kind = next((m for m in get_args(annotation)[1:] if isinstance(m, str)), None)
        return f"a spec of kind {kind!r}" if kind else _show(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(json.dumps(a) for a in get_args(annotation))
    return annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)


def _hint(value: Any, annotation: Any) -> str:
    if get_origin(annotation) is Literal and isinstance(value, str):
        return "; " + nearest(value, (str(a) for a in get_args(annotation)))
    return ""
