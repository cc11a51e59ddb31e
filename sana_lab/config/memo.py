"""Results that are reused within a block: a sweep of a thousand trials resolves, hashes and builds equal sections once.

Outside of `reusing` nothing is stored, as files and guests that a configuration names may change between two calls.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")

_results: ContextVar[dict[Hashable, Any] | None] = ContextVar("results", default=None)


@contextmanager
def reusing() -> Iterator[None]:
    """Reuse results until the outermost block of this thread ends."""
    if _results.get() is not None:
        yield
        return
    token = _results.set({})
    try:
        yield
    finally:
        _results.reset(token)


def reuse(key: tuple[Any, ...], compute: Callable[[], T]) -> T:
    """The result that was computed in this block for an equal key of plain data, or a new one.

    The result is shared: it must not be changed. An error is not stored.
    """
    results = _results.get()
    if results is None:
        return compute()
    hashable = frozen(key)
    if hashable not in results:
        results[hashable] = compute()
    return results[hashable]


def frozen(value: Any) -> Hashable:
    """Plain data as a key: equal for the same types, values and order of keys, so that 1, 1.0 and True differ."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return (dict, *((k, frozen(v)) for k, v in value.items()))
    if isinstance(value, list | tuple):
        return (list, *map(frozen, value))
    if hasattr(value, "as_key"):  # a scalar as it is written in YAML
        return (type(value), frozen(value.as_key()))
    return (type(value), value)
