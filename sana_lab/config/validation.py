"""Validation of option values against type annotations, by pydantic; the error of a configuration.

Values are plain data, as YAML and JSON hold it. Scalars are strict: a bool is no int, "3" is no int; an int is accepted
for a float and becomes one. A list is accepted for a tuple and a tuple for a list; the result is a list. Specs and
dataclasses inside an annotation admit anything here: `specs.check` resolves them, since their errors name options.

YAML 1.1 reads `10_1` as 101, `no` as false and `1e3` as 1000. An option whose type is text takes the text as it is
`Written`; every other option takes YAML's reading.
"""

import difflib
import functools
import json
import math
import types
from collections.abc import Iterable
from dataclasses import is_dataclass
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import AfterValidator, AllowInfNan, Strict, TypeAdapter, ValidationError

SCALARS = (int, float, str, bool)
PLAIN = (*SCALARS, dict, list, tuple, type(None))


class SpecError(ValueError):
    """A configuration error that the user can fix: what was given, what was expected and the nearest right answer."""


class Written:
    """A plain scalar of a YAML file, or the value of `key=value`: its text, and what YAML reads in it."""

    def __init__(self, text: str, value: Any) -> None:
        self.text, self.value = text, value

    def as_key(self) -> tuple[str, Any]:
        """What tells it from others, as the key of a stored result."""
        return self.text, self.value

    def __str__(self) -> str:
        """The text, for interpolation inside other text."""
        return self.text

    def __repr__(self) -> str:
        return repr(plain(self.value))

    def __eq__(self, other: object) -> bool:
        return plain(self) == plain(other)

    __hash__ = None  # type: ignore[assignment]


def plain(value: Any) -> Any:
    """Plain data with YAML's reading of every scalar."""
    if isinstance(value, Written):
        return plain(value.value)
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def opened(value: Any) -> Any:
    """The list or mapping of a `key=value`, whose items stay written; anything else as it is."""
    return value.value if isinstance(value, Written) and isinstance(value.value, dict | list) else value


LISTED = 100  # options in a message


def nearest(word: str, options: Iterable[str]) -> str:
    """A did-you-mean clause for the closest option, or the list of the options if none is close."""
    names = sorted(options)
    close = difflib.get_close_matches(word, names, 1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"there is: {', '.join(names[:LISTED]) or 'nothing'}{more}"


def validate(value: Any, annotation: Any, where: str) -> Any:
    """`value` as plain data of the annotated type. SpecError with the path below `where`, value and expected type."""
    value = typed(value, annotation)
    try:
        return _as_lists(_adapter(annotation).validate_python(value))
    except ValidationError as error:
        path, value, annotation = _innermost(where, value, annotation, error.errors()[0]["loc"])
        raise SpecError(
            f"{path} is {value!r} ({type(value).__name__}), expected {describe(annotation)}{_hint(value, annotation)}"
        ) from None


def typed(value: Any, annotation: Any) -> Any:
    """`value` with each `Written` scalar read as its type says: its text where that is text, else YAML's reading."""
    annotation = bare(annotation) if kind_of(annotation) is None else annotation
    origin, inner = get_origin(annotation), get_args(annotation)
    if kind_of(annotation):
        return _as_spec(value, annotation)
    if isinstance(value, Written):
        return _read(value, annotation)
    if _is_union(annotation):
        return typed(value, next((m for m in inner if _may_hold(m, value)), Any))
    if origin in (list, tuple) and isinstance(value, list | tuple):
        types = inner if origin is tuple and inner[-1] is not Ellipsis else (inner[0],) * len(value)
        return [typed(v, t) for v, t in zip(value, types, strict=False)] + list(value[len(types) :])
    if origin is dict and isinstance(value, dict):
        return {k: typed(v, inner[1]) for k, v in value.items()}
    return value if is_dataclass(annotation) else plain(value)


def _may_hold(member: Any, value: Any) -> bool:
    """Whether a list or mapping is of this member of a union."""
    container = get_origin(bare(member)) or bare(member)
    return container in (list, tuple, dict) and isinstance(value, dict if container is dict else (list, tuple))


def _as_spec(value: Any, annotation: Any) -> Any:
    """A spec whose options stay written; a name that YAML reads as a number or truth value is text."""
    if not isinstance(value, Written) or isinstance(value.value, dict | list):
        return opened(value)
    return None if value.value is None else value.text


def _read(value: Written, annotation: Any) -> Any:
    members = get_args(annotation) if _is_union(annotation) else (annotation,)
    bare_members = [bare(m) for m in members]
    choices = [c for m in bare_members if get_origin(m) is Literal for c in get_args(m)]
    reading = plain(value.value)
    if any(c == reading and type(c) is type(reading) for c in choices):
        return reading
    if value.text in choices:
        return value.text
    if str not in bare_members:
        return typed(value.value, annotation) if isinstance(value.value, dict | list) else reading
    if reading is None and (is_optional(annotation) or not value.text.strip()):
        return None
    others = [m for m in bare_members if m in SCALARS and m is not str]
    return reading if type(reading) in others else value.text


@functools.cache
def bare(annotation: Any) -> Any:
    """The annotation without its marks."""
    return bare(get_args(annotation)[0]) if get_origin(annotation) is Annotated else annotation


@functools.cache
def kind_of(annotation: Any) -> str | None:
    """The kind of part that a spec with this annotation names: `Annotated[Spec, "attention"]`; None for plain data."""
    if get_origin(annotation) is Annotated:
        return next((mark for mark in get_args(annotation)[1:] if isinstance(mark, str)), None)
    return next(filter(None, map(kind_of, get_args(annotation))), None) if _is_union(annotation) else None


@functools.cache
def is_optional(annotation: Any) -> bool:
    """Whether None is a value of this type."""
    if get_origin(annotation) is Annotated:
        return is_optional(get_args(annotation)[0])
    return annotation in (None, type(None)) or (_is_union(annotation) and any(map(is_optional, get_args(annotation))))


def admits_list(annotation: Any) -> bool:
    """Whether an option of a kind of part takes a list of specs: `Annotated[Spec | list[Spec], "method"]`."""
    return get_origin(annotation) is list or any(map(admits_list, get_args(annotation)))


def describe(annotation: Any) -> str:
    """The type in words for an error message."""
    if kind := kind_of(annotation):
        return f"a spec of kind {kind!r}" + (", or a list of them" if admits_list(annotation) else "")
    if get_origin(annotation) is Annotated:
        return f"{describe(get_args(annotation)[0])} {range_words(annotation)}".rstrip()
    if _is_union(annotation):
        return " | ".join(map(describe, get_args(annotation)))
    if get_origin(annotation) in (list, tuple):
        items = ", ".join("..." if item is Ellipsis else describe(item) for item in get_args(annotation))
        return f"{get_origin(annotation).__name__}[{items}]"
    if annotation in (None, type(None)):
        return "None"
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(json.dumps(choice) for choice in get_args(annotation))
    return annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)


def range_words(annotation: Any) -> str:
    """The range in an annotation, such as `>= 1` or `in [0, 1)`; "" where it has none."""
    low = high = one = ""
    for bound in _bounds(annotation):
        match bound:
            case Ge(ge=ge):
                low, one = f"[{_short(ge)}", f">= {_short(ge)}"
            case Gt(gt=gt):
                low, one = f"({_short(gt)}", f"> {_short(gt)}"
            case Le(le=le):
                high, one = f"{_short(le)}]", one or f"<= {_short(le)}"
            case Lt(lt=lt):
                high, one = f"{_short(lt)})", one or f"< {_short(lt)}"
            case MinLen(min_length=length):
                return f"of at least {length}"
    return f"in {low}, {high}" if low and high else one


def _bounds(annotation: Any) -> list[Any]:
    marks = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
    return [m for m in marks if isinstance(m, Ge | Gt | Le | Lt | MinLen)]


def _short(number: Any) -> str:
    return f"{number:g}" if isinstance(number, float) else str(number)


@functools.cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(_plain(annotation))


def _plain(annotation: Any) -> Any:
    """The type that pydantic checks: strict scalars; classes of torch or the user are replaced by Any.

    In a union with scalars (`float | Tensor`) such classes are ignored, since no YAML value can be one.
    """
    inner = get_args(annotation)
    if annotation is float:
        return Annotated[float, Strict(), AllowInfNan(False)]
    if annotation in SCALARS:
        return Annotated[annotation, Strict()]
    if get_origin(annotation) is Literal:
        return Annotated[Any, AfterValidator(functools.partial(_check_choice, inner))]
    if kind_of(annotation):
        return Any
    if get_origin(annotation) is Annotated:
        return Annotated[(_plain(inner[0]), *_bounds(annotation))] if _bounds(annotation) else _plain(inner[0])
    if _is_union(annotation):
        scalars = any(member in SCALARS for member in inner)
        return Union[tuple(_plain(m) for m in inner if not (scalars and _is_foreign(m)))]  # noqa: UP007
    if get_origin(annotation) is dict:
        return dict[Any, _plain(inner[1])]  # type: ignore[misc]
    if get_origin(annotation) in (list, tuple):
        return get_origin(annotation)[tuple(m if m is Ellipsis else _plain(m) for m in inner)]
    return annotation if annotation in (None, *PLAIN) else Any


def _check_choice(choices: tuple[Any, ...], value: Any) -> Any:
    """One of a Literal's choices, of the same type: pydantic's own Literal takes 1.0 and True for 1."""
    if not any(value == choice and type(value) is type(choice) for choice in choices):
        raise ValueError("not a choice")
    return value


def _is_union(annotation: Any) -> TypeGuard[Any]:
    return get_origin(annotation) in (Union, types.UnionType)


def _is_foreign(member: Any) -> bool:
    return isinstance(member, type) and member not in PLAIN and not is_dataclass(member) and not get_origin(member)


def _as_lists(value: Any) -> Any:
    """Tuples, also inside lists and mappings, as lists: what YAML and JSON read back."""
    if isinstance(value, list | tuple):
        return [_as_lists(v) for v in value]
    return {k: _as_lists(v) for k, v in value.items()} if isinstance(value, dict) else value


def _innermost(where: str, value: Any, annotation: Any, location: tuple[Any, ...]) -> tuple[str, Any, Any]:
    """Path, value and annotation of the value that pydantic refused; of a union, the union as a whole."""
    whole, annotation = annotation, bare(annotation)
    inner = get_args(annotation)
    if not location or get_origin(annotation) not in (list, tuple, dict):
        return where, value, whole
    step, rest = location[0], location[1:]
    if isinstance(value, dict):
        return _innermost(f"{where}.{step}", value[step], inner[1], rest)
    if not isinstance(value, list | tuple) or not isinstance(step, int) or step >= len(value):
        return where, value, whole
    item = inner[step] if get_origin(annotation) is tuple and inner[-1] is not Ellipsis else inner[0]
    return _innermost(f"{where}[{step}]", value[step], item, rest)


def _hint(value: Any, annotation: Any) -> str:
    members = get_args(bare(annotation)) if _is_union(bare(annotation)) else (annotation,)
    if type(value) in (int, float) and math.isfinite(value) and (bounds := [b for m in members for b in _bounds(m)]):
        near: Any = next((b.ge for b in bounds if isinstance(b, Ge) and value < b.ge), None)
        near = next((b.le for b in bounds if isinstance(b, Le) and value > b.le), near)
        return "" if near is None else f"; the nearest is {_short(near)}"
    annotation = bare(annotation)
    if get_origin(annotation) is Literal and isinstance(value, str):
        return "; " + nearest(value, (str(choice) for choice in get_args(annotation)))
    return ""
