"""YAML files and the values of `key=value`, read so that scalars keep their text (`validation.Written`)."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from sana_lab.config import text_files
from sana_lab.config.validation import SpecError, Written

MOST_VALUES = 100_000  # in one file, aliases expanded

FLOAT = re.compile(
    r"""^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
     |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
     |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
     |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)


INT = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$")
REPLACED = (":timestamp", ":float", ":int")


class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Safe types of YAML. 1e-3 is a number, which YAML 1.1 takes for text; dates, 0012 and 12:30 are text."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(REPLACED)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


Loader.add_implicit_resolver("tag:yaml.org,2002:int", INT, list("-+0123456789"))
Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))


def read_file(path: Path) -> Any:
    """The content of a YAML file: dicts with text keys, lists, text, None and `Written`. SpecError with the line."""
    try:
        return _parse(text_files.read(path))
    except (yaml.YAMLError, RecursionError, ValueError, OSError) as error:
        raise SpecError(f"{path} cannot be read as YAML: {str(error).strip()}") from error


def read_value(text: str) -> Any:
    """The value of `key=value`: quoted text without its quotes, text that YAML reads as text, else `Written`.

    Text is kept whole where YAML would cut it at ` #`, or cannot read it.
    """
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise SpecError(f"{text!a} is no UTF-8 text")
    try:
        nodes = list(yaml.compose_all(text, Loader=Loader))
        value = _parse(text)
    except (yaml.YAMLError, RecursionError, ValueError):
        return text
    if not nodes:
        return text if text.strip() else Written(text, None)
    if len(nodes) > 1 or _has_comment(text):
        return text
    if isinstance(value, str):
        return value if nodes[0].style else text
    return Written(text, value.value if isinstance(value, Written) else value)


def _has_comment(text: str) -> bool:
    """Whether text follows the last token."""
    ends = [t.end_mark.index for t in yaml.scan(text, Loader=Loader) if not isinstance(t, yaml.StreamEndToken)]
    last = max((e for e in ends if e <= len(text.rstrip())), default=0)
    return "#" in text[last:]


def _parse(text: str) -> Any:
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        return None if node is None else _construct(loader, node, (), iter(range(MOST_VALUES)))
    finally:
        loader.dispose()


def _construct(loader: Loader, node: yaml.Node, outer: tuple[yaml.Node, ...], budget: Iterator[int]) -> Any:
    if node in outer:
        raise _error("a value holds itself", node)
    if next(budget, None) is None:
        raise _error(f"there are more than {MOST_VALUES} values", node)
    inside = (*outer, node)
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        loader.flatten_mapping(node)
        return {key.value: _construct(loader, value, inside, budget) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_construct(loader, item, inside, budget) for item in node.value]
    value = loader.construct_object(node)
    if isinstance(value, bool | int | float):
        return Written(node.value, value)
    if value is None or isinstance(value, str):
        return value
    raise _error(f"{type(value).__name__} is no plain value", node)


def _check_keys(node: yaml.MappingNode) -> None:
    """Keys are text as it is written, each of them once."""
    keys: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _error("a key is a list or mapping, expected text", key)
        if key.value in keys and not key.tag.endswith(":merge"):
            raise _error(f"found duplicate key {key.value}", key)
        keys.add(key.value)


def _error(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
