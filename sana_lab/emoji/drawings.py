"""What each emoji shows: concept, skin tones, caption words; and which combinations of both are held out."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from sana_lab.emoji.archives import code
from sana_lab.types import Json

By = Literal["combinations", "concepts"]
"""Unit of the split: concept and skin tones together, or whole concepts."""

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
"""Skin tones 1 to 5 of Unicode, in words."""

STYLES = {"noto": "Noto", "twemoji": "Twemoji"}
"""Vendor -> its name in captions."""

PERSON, CHILD, JOIN = "1f9d1", "1f9d2", "200d"

_SIGNS = ("2640", "2642", "27a1")  # woman, man, facing right

_NEUTRAL = {
    **dict.fromkeys(("1f468", "1f469"), PERSON),
    **dict.fromkeys(("1f466", "1f467"), CHILD),
    **dict.fromkeys(("1f474", "1f475"), "1f9d3"),  # older man, woman -> person
    **dict.fromkeys(("1f934", "1f478"), "1fac5"),  # prince, princess -> person with crown
    **dict.fromkeys(("1f930", "1fac3"), "1fac4"),  # pregnant woman, man -> person
    **dict.fromkeys(("1f57a",), "1f483"),  # man, woman dancing
    **dict.fromkeys(("1f385", "1f936"), f"{PERSON}-{JOIN}-1f384"),  # Santa, Mrs. and Mx Claus
    **dict.fromkeys(("1f46b", "1f46c", "1f46d"), f"{PERSON}-{JOIN}-1f91d-{JOIN}-{PERSON}"),  # holding hands
    "1f491": f"{PERSON}-{JOIN}-2764-{JOIN}-{PERSON}",  # couple with heart
    "1f48f": f"{PERSON}-{JOIN}-2764-{JOIN}-1f48b-{JOIN}-{PERSON}",  # kiss
}
"""Code points of a man, a woman, a couple -> those of the same concept without gender."""


class Drawing(NamedTuple):
    """One emoji of one vendor."""

    vendor: str  # noto, twemoji
    code: str  # code points without variation selectors, lower case
    label: str  # "waving hand: light skin tone"
    base: str  # label without tones: "waving hand"
    concept: str  # code of the base without gender and direction: man and woman with one occupation are one concept
    tones: tuple[int, ...]  # 1 light to 5 dark, in the label's order; two for some couples, empty for yellow
    subgroup: int  # Unicode's subgroup, such as hand-fingers-open
    tags: tuple[str, ...]


def concept(points: str) -> str:
    """The code of an entry without gender and direction."""
    first, *joined = code(points).split(f"-{JOIN}-")
    kept = [first, *(part for part in joined if part not in _SIGNS)]
    return f"-{JOIN}-".join("-".join(_NEUTRAL.get(p, p) for p in part.split("-")) for part in kept)


def listed(entries: Sequence[Json], vendor: str, codes: Mapping[str, object]) -> Iterator[Drawing]:
    """The drawings of a vendor that have these codes, in the order of emojibase's table."""
    for entry in entries:
        for each in (entry, *entry.get("skins", ())):
            points = code(each["hexcode"])
            if points in codes:
                tone = each.get("tone", ())
                tones = tuple(tone) if isinstance(tone, list | tuple) else (tone,)
                facts = (entry["label"], concept(entry["hexcode"]), tones, entry.get("subgroup", -1))
                yield Drawing(vendor, points, each["label"], *facts, tuple(entry.get("tags", ())))


def captions(drawing: Drawing) -> list[str]:
    """Captions of a drawing: the label with the vendor's style, in two forms, alone and with each of its tags."""
    label, style = drawing.label, STYLES[drawing.vendor]
    plain = [f"{label}, {style}", f"{style} emoji, {label}"]
    tagged = [f"{label}, {tag}, {style}" for tag in drawing.tags]
    return plain + [caption for tag in tagged for caption in (tag, plain[1])] if tagged else plain


def is_held_out(drawing: Drawing, by: By, share: float) -> bool:
    """Whether a drawing is on the held-out side: a hash of its unit is below the share.

    The unit is the same for both vendors and all genders, so no held-out label has a twin to train on. By
    `combinations` of a concept with skin tones, in any order, drawings without a tone are trained on; by `concepts`,
    all tones of a concept are on one side.
    """
    tones = tuple(sorted(set(drawing.tones))) if by == "combinations" else ()
    if by == "combinations" and not tones:
        return False
    return _hash(f"{drawing.concept} {tones}") < share


def shuffled(drawings: Sequence[Drawing]) -> list[Drawing]:
    """A fixed order in which each beginning is a fair sample."""
    return sorted(drawings, key=lambda drawing: _hash(f"{drawing.label} {drawing.vendor}"))


def _hash(text: str) -> float:
    """A number in [0, 1)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7]) / 2**56
