"""Guests: a user's own code, named `module:attribute` in their YAML or on their command line, and by nothing else.

A file from elsewhere (a card, a checkpoint's hyperparameters, a config.json) names registered parts only. `check` looks
through what a file brings; within `brought_by` the one door for code, `load`, is shut, however a name reaches it.
"""

import functools
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from sana_lab.config.registry import TABLE
from sana_lab.config.validation import SpecError, nearest

FREE_TEXT = ("prompts", "negative", "instruction", "title", "notes")
"""Options with free text, in which a colon is not a reference."""

RECIPE = r"[\w-][\w.-]*(/[\w-][\w.-]*)*"
"""Name of a recipe in the user's own folders, as opposed to a path."""

INTERPOLATION = re.compile(r"\$\{[^${}]*\}")
"""`${...}`, which stays text in a file; its colons name no module."""

_source: ContextVar[str | None] = ContextVar("source", default=None)


@contextmanager
def brought_by(source: str) -> Iterator[None]:
    """Refuse all code but the lab's within the block, which reads or builds what the file `source` brings."""
    token = _source.set(source)
    try:
        yield
    finally:
        _source.reset(token)


def load(name: str, what: str) -> Any:
    """The attribute of a user's `module:attribute`, from the working directory or what is installed. SpecError.

    `what` says in errors what it was wanted for. Importing the module is all that runs.
    """
    if (source := _source.get()) is not None:
        raise refusal(name, source)
    module, _, attribute = name.partition(":")
    _add_working_directory()
    try:
        return functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise SpecError(
            f"{what} {name!r}: there is no module {error.name!r}, neither in {Path.cwd()} nor installed"
        ) from error
    except AttributeError as error:
        if module not in sys.modules:
            raise
        near = nearest(attribute, (key for key in vars(sys.modules[module]) if not key.startswith("_")))
        raise SpecError(f"{what} {name!r}: module {module!r} has no {attribute!r}; {near}") from error
    except (TypeError, ValueError) as error:
        if module and not module.startswith("."):
            raise
        raise SpecError(f"{what} {name!r} names no module; expected module:attribute") from error


def locate(module: str) -> ModuleSpec | None:
    """Path of a user's module, without importing it; None if missing or if the name comes from a loaded file."""
    if _source.get() is not None:
        return None
    _add_working_directory()
    try:
        return importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None


def check(value: Any, source: str, key: str = "") -> None:
    """SpecError if the specs of a file name code, or a recipe by its path, at any depth, in any form."""
    if isinstance(value, dict):
        for inner, entry in value.items():
            check(entry, source, str(inner))
    elif isinstance(value, list | tuple | set | frozenset):
        for entry in value:
            check(entry, source, key)
    elif isinstance(value, str) and ":" in INTERPOLATION.sub("", value) and key not in FREE_TEXT:
        _check_text(value, source, key)


def check_recipe(name: Any, source: str) -> str:
    """The name of an experiment that a file says it is of. SpecError unless it is one of the user's own recipes."""
    if not isinstance(name, str) or not re.fullmatch(RECIPE, name) or name.endswith((".yaml", ".yml")):
        raise SpecError(f"{source} names the experiment {name!r}, expected a name, which a path is not")
    return name


def refusal(name: str, source: str) -> SpecError:
    """The error for code that a file names."""
    return SpecError(
        f"{source} asks for {name!r}, code from outside the lab, which a file may not; build its system from your own "
        "YAML and give that experiment's name"
    )


def _check_text(value: str, source: str, key: str) -> None:
    if value.startswith("experiment:"):
        if key == "name" or key in TABLE:
            raise SpecError(f"{source} asks for {value!r} as a part, which a file may not; expected the part's spec")
        check_recipe(value.removeprefix("experiment:"), source)
        return
    is_path = "/" in value or "\\" in value
    is_device = key == "device" and re.fullmatch(r"\w+:\d+", value)
    if key == "name" or key in TABLE or not (is_path or is_device):
        raise refusal(value, source)


def _add_working_directory() -> None:
    """Search it last, so that a user's file hides no installed module."""
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
        importlib.invalidate_caches()
