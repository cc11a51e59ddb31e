"""Captions of the embedded world: equality of meaning, and false captions that differ by one word."""

import re
from collections.abc import Iterator

from sana_lab.evaluation.geneval.vocabulary import COLORS, NUMBERS, plural
from sana_lab.shapes.scenes import OPPOSITE, SHAPES, Scene, captions

KINDS: dict[str, tuple[str, ...]] = {
    "color": COLORS,
    "shape": SHAPES,
    "shapes": tuple(plural(shape) for shape in SHAPES),
    "number": tuple(NUMBERS.values()),
    "relation": tuple(OPPOSITE),
}
"""Kind of word -> words that can replace each other."""


def meaning(caption: str) -> tuple[str, ...]:
    """Normal form of a caption: without the prefix and independent of the order of objects."""
    phrase = caption.removeprefix("a photo of ")
    for how, back in OPPOSITE.items():
        if f" {how} " in phrase:
            a, b = phrase.split(f" {how} ", 1)
            return min((a, how, b), (b, back, a))
    return tuple(sorted(re.split(", | and ", phrase)))


def truths(scene: Scene) -> set[tuple[str, ...]]:
    """Normal forms of all captions of a scene."""
    return {meaning(caption) for caption in captions(scene)}


def one_word_off(caption: str) -> dict[str, list[str]]:
    """Kind of word -> captions in which one word of that kind is replaced by another of the same kind.

    "swap" exchanges two different colours. Kinds that do not occur are omitted.
    """
    replaced = {kind: list(_replaced(caption, words)) for kind, words in KINDS.items()}
    return {kind: texts for kind, texts in {**replaced, "swap": list(_swapped(caption))}.items() if texts}


def _replaced(caption: str, words: tuple[str, ...]) -> Iterator[str]:
    for match in re.finditer(rf"\b({'|'.join(words)})\b", caption):
        for word in words:
            if word != match[0]:
                yield _articles(f"{caption[: match.start()]}{word}{caption[match.end() :]}")


def _swapped(caption: str) -> Iterator[str]:
    matches = list(re.finditer(rf"\b({'|'.join(COLORS)})\b", caption))
    for i, a in enumerate(matches):
        for b in matches[i + 1 :]:
            if a[0] != b[0]:
                between = caption[a.end() : b.start()]
                yield _articles(f"{caption[: a.start()]}{b[0]}{between}{a[0]}{caption[b.end() :]}")


def _articles(caption: str) -> str:
    return re.sub(r"\ban? (\w)", lambda m: f"{'an' if m[1] in 'aeiou' else 'a'} {m[1]}", caption)
