"""Interpolations in a user's own YAML and `key=value`: `${key}` and `${oc.env:NAME}`.

They are resolved while an experiment loads. What an environment variable gave is used, and never stored: a completed
configuration has the text of those options under `WRITTEN`, and `as_written` puts it back. Nothing that a file from
elsewhere brings is resolved.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sana_lab.config.registry import RENAMED
from sana_lab.config.validation import SpecError, Written, opened, plain

WRITTEN = "written"
"""Key of a completed configuration: [path, text such as `${oc.env:NAME}`] of options from environment variables."""

ENVIRONMENT = re.compile(r"\boc\.env\b")
REFERENCE = re.compile(r"\$\{([^${}:]+)\}")  # of a key, not of a resolver

Config = dict[str, Any]
Path = tuple[str | int, ...]
Texts = list[tuple[Path, str]]


def interpolated(config: Config, title: str) -> Config:
    """`${key}` replaced by the value of that key; all else as it is. SpecError."""
    if not _has_interpolation(config):
        return config
    try:
        tree = OmegaConf.create(_needed(_leaves(config)), flags={"allow_objects": True})
        resolved = OmegaConf.to_container(tree, resolve=True)
    except (OmegaConfBaseException, RecursionError) as error:
        raise SpecError(f"{title}: {next(iter(str(error).splitlines()), type(error).__name__)}") from error
    return cast(Config, _replaced(config, resolved))


def environment_texts(config: Config) -> Texts:
    """Each value that reads an environment variable, itself or through other keys."""
    texts = {path: text for path, text in texts_in(plain(config)) if "${" in text}
    tainted = {path for path, text in texts.items() if ENVIRONMENT.search(text)}
    while more := {p for p, text in texts.items() if p not in tainted and _reads(text, tainted)}:
        tainted |= more
    return [(path, text) for path, text in texts.items() if path in tainted]


def with_written(config: Config, texts: Texts, title: str) -> Config:
    """A completed configuration with the texts of what came from the environment. SpecError if one has no place."""
    places = [(_place(config, path, title), text) for path, text in texts]
    return {**config, WRITTEN: [[list(place), text] for place, text in places]} if places else config


def as_written(config: Config) -> Config:
    """The configuration to store: options that came from the environment as they were written."""
    stored: Any = {k: v for k, v in config.items() if k != WRITTEN}
    for path, text in config.get(WRITTEN, []):
        stored = _set(stored, path, text)
    return cast(Config, stored)


def check_from_file(value: Any, source: str, path: str) -> None:
    """SpecError if what a file brings would have to be resolved: variables are read for the user's own YAML only."""
    for place, text in texts_in(value):
        if ENVIRONMENT.search(text) and "${" in text:
            raise SpecError(
                f"{source} has {_dotted((path, *place))} {text!r}, an environment variable, which is read for your own "
                "YAML and command line, not for a file; give the experiment's name in place of the file"
            )


def texts_in(value: Any, path: Path = ()) -> Iterator[tuple[Path, str]]:
    """(path, text) of every text in plain data."""
    if isinstance(value, str):
        yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from texts_in(inner, (*path, key))


def _has_interpolation(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_has_interpolation, value.values() if isinstance(value, dict) else value))
    return "${" in str(value) if isinstance(value, str | Written) else False


def _leaves(value: Any) -> Any:
    """The configuration with the lists and mappings of `key=value` opened, as OmegaConf reads it."""
    value = opened(value)
    if isinstance(value, dict):
        return {k: _leaves(v) for k, v in value.items()}
    return [_leaves(v) for v in value] if isinstance(value, list) else value


def _needed(tree: Config) -> Config:
    """What OmegaConf must see to resolve a tree: the texts with interpolations and what they refer to. It takes
    milliseconds for a whole experiment, of which most refer to their seed alone."""
    paths = set[Path]()
    for path, text in texts_in(tree):
        if "${" in text:
            keys = REFERENCE.findall(text)
            if text.count("${") > len(keys) or any(key.startswith(".") or "[" in key for key in keys):
                return tree  # of a resolver, nested or relative
            paths |= {path, *(tuple(key.split(".")) for key in keys)}
    return cast(Config, _pruned(tree, paths, {path[:i] for path in paths for i in range(len(path))}))


def _pruned(value: Any, paths: set[Path], above: set[Path], at: Path = ()) -> Any:
    """The value without the keys of mappings that no path leads to; lists are whole."""
    if at in paths or not isinstance(value, dict):
        return value
    inner = {k: (*at, k) for k in value}
    return {k: _pruned(value[k], paths, above, p) for k, p in inner.items() if p in paths or p in above}


def _replaced(value: Any, resolved: Any) -> Any:
    """Interpolated parts of `value` from `resolved`, which has the same shape where there are some."""
    if not _has_interpolation(value):
        return value
    inner = opened(value)
    if isinstance(inner, dict):
        return {k: _replaced(v, resolved.get(k)) for k, v in inner.items()}
    return [_replaced(v, r) for v, r in zip(inner, resolved, strict=True)] if isinstance(inner, list) else resolved


def _reads(text: str, tainted: set[Path]) -> bool:
    """Whether a text names one of these keys, or a mapping around one; a reference that is nested or relative may."""
    if not tainted:
        return False
    keys = [tuple(key.replace("[", ".").replace("]", "").split(".")) for key in REFERENCE.findall(text)]
    if text.count("${") > len(keys) or any("" in key for key in keys):
        return True
    paths = [tuple(map(str, path)) for path in tainted]
    return any(a[: len(b)] == b or b[: len(a)] == a for a in keys for b in paths)


def _place(config: Any, path: Path, title: str) -> Path:
    """The path with options under their names of today."""
    place: Path = ()
    for step in path:
        names = [step, *(old[str(step)] for old in RENAMED.values() if step in old)]
        today = next((name for name in names if _has(config, name)), None)
        if today is None:
            raise SpecError(f"{title}: {_dotted(path)} comes from the environment and could not be stored as written")
        place, config = (*place, today), config[today]
    return place


def _has(config: Any, step: str | int) -> bool:
    if isinstance(config, list):
        return isinstance(step, int) and step < len(config)
    return isinstance(config, dict) and step in config


def _set(value: Any, path: Sequence[str | int], text: str) -> Any:
    """Plain data with the text at a path; a text on the way stays."""
    if not path:
        return text
    if isinstance(value, list):
        return [_set(v, path[1:], text) if i == path[0] else v for i, v in enumerate(value)]
    if isinstance(value, dict):
        return {k: _set(v, path[1:], text) if k == path[0] else v for k, v in value.items()}
    return value


def _dotted(path: Path) -> str:
    return ".".join(map(str, path))
