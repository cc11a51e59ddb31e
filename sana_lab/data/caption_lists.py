"""Lists of captions that a program wrote into one text field: as JSON, Python, numpy or R writes them."""

import ast
import json
import re

MISSING = frozenset(
    {
        *(
            "nan",
            "-nan",
            "NaN",
            "-NaN",
            "NA",
            "N/A",
            "n/a",
            "<NA>",
            "#NA",
            "#N/A",
            "None",
            "null",
            "NULL",
            "NaT",
            "\\N",
        ),
        *("#NAME?", "#REF!", "#VALUE!", "#NULL!"),
    }
)
"""What pandas, R, databases and spreadsheets write for no value."""

_STRING = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_COMMAS = rf"{_STRING}(?:\s*,\s*{_STRING})*\s*,?"
_LIST = re.compile(
    rf"(?:\[\s*(?:{_COMMAS}|{_STRING}(?:\s+{_STRING})*)?\s*\]"  # Python's or, with blanks between, numpy's
    rf"|(?:c\(|\{{)\s*{_COMMAS}\s*[)}}]"  # R's vector, Python's set
    rf"|\(\s*{_STRING}\s*,\s*(?:{_COMMAS})?\s*\))",  # Python's tuple
    re.DOTALL,
)
_QUOTED = re.compile(
    r"""[\[{]\s*['"]|(?:c|list|array|tuple|set|Index|Series)\(\s*[\['"{]|\[\s*\[|b(['"]).*\1\Z""", re.DOTALL
)
_BRACKETED = re.compile(r"\[[^\[\]]*\]|\{.*\}", re.DOTALL)


def parse(field: str, *, bare: bool) -> list[str]:
    """The captions of a field: the items of a list, or the field itself.

    With `bare`, of a CSV, where a list can only be text: brackets around all of the field must be a list, and a word
    for no value is no caption. ValueError if a field begins as a list and is none.
    """
    text = field.strip()
    if bare and text in MISSING:
        return []
    items = _items(text)
    if items is not None:
        return items
    if _QUOTED.match(text) or (bare and _BRACKETED.fullmatch(text)):
        shown = text if len(text) <= 80 else f"{text[:77]}..."
        raise ValueError(f'{shown!r} looks like a list and is none; expected JSON such as ["a cat", "a small cat"]')
    return [field]


def _items(text: str) -> list[str] | None:
    """The texts of a list; None if it is not a list of texts."""
    items = _json(text)
    return _literals(text) if items is None else items


def _json(text: str) -> list[str] | None:
    try:
        value = json.loads(text) if text.startswith("[") else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) and all(isinstance(item, str) for item in value) else None


def _literals(text: str) -> list[str] | None:
    if not _LIST.fullmatch(text):
        return None
    try:
        return [ast.literal_eval(item) for item in re.findall(_STRING, text, re.DOTALL)]
    except (ValueError, SyntaxError):
        return None
