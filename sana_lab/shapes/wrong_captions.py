"""Captions of the embedded world as meanings: which are true of a scene, and wrong ones that differ by one word."""

import re
from collections.abc import Iterator

from sana_lab.shapes.scenes import COLORS, NUMBERS, OPPOSITE, SHAPES, Scene, captions, plural

KINDS: dict[str, tuple[str, ...]] = {
    "color": COLORS,
    "shape": SHAPES,
    "shapes": tuple(plural(shape) for shape in SHAPES),
    "number": tuple(NUMBERS.values()),
    "relation": tuple(OPPOSITE),
}
"""Which words can take each other's place."""


def meaning(caption: str) -> tuple[str, ...]:
    """The same for captions that say the same: without the prefix, in whatever order objects are named."""
    phrase = caption.removeprefix("a photo of ")
    for how, back in OPPOSITE.items():
        if f" {how} " in phrase:
            a, b = phrase.split(f" {how} ", 1)
            return min((a, how, b), (b, back, a))
    return tuple(sorted(re.split(", | and ", phrase)))


def truths(scene: Scene) -> set[tuple[str, ...]]:
    """What can be said of a scene; each names all of its objects."""
    return {meaning(caption) for caption in captions(scene)}


def one_word_off(caption: str) -> dict[str, list[str]]:
    """For each kind of word in a caption, the captions with one such word replaced by another of its kind.

    Under "swap" are those where two different colours have changed places.
    """
    found = {kind: list(_replaced(caption, words)) for kind, words in KINDS.items()}
    return {kind: texts for kind, texts in {**found, "swap": list(_swapped(caption))}.items() if texts}


def _replaced(caption: str, words: tuple[str, ...]) -> Iterator[str]:
    for at in re.finditer(rf"\b({'|'.join(words)})\b", caption):
        for word in words:
            if word != at[0]:
                yield _articles(f"{caption[: at.start()]}{word}{caption[at.end() :]}")


def _swapped(caption: str) -> Iterator[str]:
    places = list(re.finditer(rf"\b({'|'.join(COLORS)})\b", caption))
    for i, a in enumerate(places):
        for b in places[i + 1 :]:
            if a[0] != b[0]:
                between = caption[a.end() : b.start()]
                yield _articles(f"{caption[: a.start()]}{b[0]}{between}{a[0]}{caption[b.end() :]}")


def _articles(caption: str) -> str:
    return re.sub(r"\ban? (\w)", lambda at: f"{'an' if at[1] in 'aeiou' else 'a'} {at[1]}", caption)
