"""Validation of option values against type annotations, by pydantic; the error of a configuration.

Values are plain data, as YAML and JSON hold it. Scalars are strict: a bool is no int, "3" is no int; an int is accepted
for a float and becomes one. A list is accepted for a tuple and a tuple for a list; the result is a list. Specs and
dataclasses inside an annotation admit anything here: `specs.check` resolves them, since their errors name options.
"""

import difflib
import functools
import json
import types
from collections.abc import Iterable
from dataclasses import is_dataclass
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

from pydantic import AfterValidator, Strict, TypeAdapter, ValidationError

SCALARS = (int, float, str, bool)
PLAIN = (*SCALARS, dict, list, tuple, type(None))


class SpecError(ValueError):
    """A configuration error that the user can fix: what was given, what was expected and the nearest right answer."""


def nearest(word: str, options: Iterable[str]) -> str:
    """A did-you-mean clause for the closest option, or the list of all options if none is close."""
    names = sorted(options)
    close = difflib.get_close_matches(word, names, 1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"there is: {', '.join(names) or 'nothing'}"


def validate(value: Any, annotation: Any, where: str) -> Any:
    """`value` as plain data of the annotated type. SpecError with the path below `where`, value and expected type."""
    try:
        return _as_lists(_adapter(annotation).validate_python(value))
    except ValidationError as error:
        path, value, annotation = _innermost(where, value, annotation, error.errors()[0]["loc"])
        raise SpecError(
            f"{path} is {value!r} ({type(value).__name__}), expected {describe(annotation)}{_hint(value, annotation)}"
        ) from None


def kind_of(annotation: Any) -> str | None:
    """The kind of part that a spec with this annotation names: `Annotated[Spec, "attention"]`; None for plain data."""
    if get_origin(annotation) is Annotated:
        return next((mark for mark in get_args(annotation)[1:] if isinstance(mark, str)), None)
    return next(filter(None, map(kind_of, get_args(annotation))), None) if _is_union(annotation) else None


def is_optional(annotation: Any) -> bool:
    """Whether None is a value of this type."""
    if get_origin(annotation) is Annotated:
        return is_optional(get_args(annotation)[0])
    return annotation in (None, type(None)) or (_is_union(annotation) and any(map(is_optional, get_args(annotation))))


def describe(annotation: Any) -> str:
    """The type in words for an error message."""
    if kind := kind_of(annotation):
        return f"a spec of kind {kind!r}"
    if get_origin(annotation) is Annotated:
        return describe(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(json.dumps(choice) for choice in get_args(annotation))
    return annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)


@functools.cache
def _adapter_of_hashable(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(_plain(annotation))


def _adapter(annotation: Any) -> TypeAdapter[Any]:
    try:
        return _adapter_of_hashable(annotation)
    except TypeError:  # marks with a list in them, such as AsBefore([])
        return TypeAdapter(_plain(annotation))


def _plain(annotation: Any) -> Any:
    """The type that pydantic checks: strict scalars; classes of torch or the user are replaced by Any.

    In a union with scalars (`float | Tensor`) such classes are ignored, since no YAML value can be one.
    """
    inner = get_args(annotation)
    if annotation in SCALARS:
        return Annotated[annotation, Strict()]
    if get_origin(annotation) is Literal:
        return Annotated[Any, AfterValidator(functools.partial(_check_choice, inner))]
    if kind_of(annotation):
        return Any
    if get_origin(annotation) is Annotated:
        return _plain(inner[0])
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
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    inner = get_args(annotation)
    if not location or get_origin(annotation) not in (list, tuple, dict):
        return where, value, annotation
    step, rest = location[0], location[1:]
    if isinstance(value, dict):
        return _innermost(f"{where}.{step}", value[step], inner[1], rest)
    if not isinstance(value, list | tuple) or not isinstance(step, int) or step >= len(value):
        return where, value, annotation
    item = inner[step] if get_origin(annotation) is tuple and inner[-1] is not Ellipsis else inner[0]
    return _innermost(f"{where}[{step}]", value[step], item, rest)


def _hint(value: Any, annotation: Any) -> str:
    if get_origin(annotation) is Literal and isinstance(value, str):
        return "; " + nearest(value, (str(choice) for choice in get_args(annotation)))
    return ""
