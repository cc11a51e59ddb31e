"""The error of a configuration, and the nearest right answer that its message ends with."""

import difflib
from collections.abc import Iterable


class SpecError(ValueError):
    """A configuration error that the user can fix: what was given, what was expected and the nearest right answer."""


def nearest(word: str, options: Iterable[str]) -> str:
    """A did-you-mean clause for the closest option, or the list of all options where none is close."""
    names = sorted(options)
    close = difflib.get_close_matches(word, names, 1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"there is: {', '.join(names) or 'nothing'}"
