"""Captions of the embedded world in three styles, each a function of (seed, index, draw).

`geneval`: GenEval's patterns, each equally likely; half of them name no colour. `detailed`: the same patterns, most
with colours, most pairs with their relation. `varied`: hundreds of forms, a third of the captions `detailed`.

Every caption names every object of the scene, and nothing that is not in it.
"""

from collections.abc import Sequence
from typing import Literal, get_args

from sana_lab.evaluation.geneval.vocabulary import NUMBERS, article, plural
from sana_lab.shapes import scenes as world
from sana_lab.shapes.scenes import OPPOSITE, Int, Scene, Scenes, Thing, relation

Style = Literal["geneval", "detailed", "varied"]
STYLES: tuple[Style, ...] = get_args(Style)

COLORED = 0.75  # share of `detailed` and `varied` captions that name the colours
RELATED = 0.6  # share of captions of a pair that name its relation, where one is clear
PATTERNS = 1 / 3  # share of `varied` captions in GenEval's patterns
NUMBERS_DRAWN = 8  # uniform numbers that one caption takes

PREFIXES = ("", "a photo of ", "an image of ", "a picture of ", "a drawing of ", "there is ", "a view of ")
RELATIONS = {
    "left of": ("left of", "to the left of", "on the left of", "on the left side of"),
    "right of": ("right of", "to the right of", "on the right of", "on the right side of"),
    "above": ("above", "over", "on top of", "higher than"),
    "below": ("below", "under", "lower than", "down below"),
}
PLACES = {  # an object's place in a sentence about another
    "left of": ("to the left of it", "on its left", "on the left side of it"),
    "right of": ("to the right of it", "on its right", "on the right side of it"),
    "above": ("above it", "over it", "higher up"),
    "below": ("below it", "under it", "lower down"),
}
JOINTS = ("and", "with", "together with", "and also")


def prompts(
    rows: Scenes, seed: int, indices: Sequence[int] | Int, draw: int = 0, style: Style = "geneval"
) -> list[str]:
    """One caption of each scene, chosen by (seed, index, draw)."""
    if style == "geneval":
        return world.prompts(rows, seed, indices, draw)
    u = world.uniform(seed, indices, NUMBERS_DRAWN, stream=1002 + draw).tolist()
    return [caption(world.scene(rows, i), numbers, style) for i, numbers in enumerate(u)]


def caption(scene: Scene, u: Sequence[float], style: Style) -> str:
    """The caption of a scene that numbers `u` (8,) in [0, 1) choose, in style `detailed` or `varied`."""
    if style == "detailed" or u[7] < PATTERNS:
        return _pattern(scene, u)
    phrase = {"pair": _pair, "count": _counted}.get(scene.kind, _listed)(scene, u)
    prefix = _pick(PREFIXES, u[0])
    return phrase if prefix == "there is " and scene.kind == "count" else prefix + phrase


def _pattern(scene: Scene, u: Sequence[float]) -> str:
    """A caption in GenEval's patterns."""
    colored = u[1] < COLORED
    if scene.kind == "count":
        phrase = f"{NUMBERS[len(scene.things)]} {_name(scene.things[0], colored, several=True)}"
    else:
        things = _shuffled(scene.things, u[3])
        how = _related(things, u[2])
        names = [article(_name(thing, colored)) for thing in things]
        phrase = f" {how} ".join(names) if how else _enumerated(names, "and")
    return ("a photo of " if u[0] < 0.5 else "") + phrase


def _pair(scene: Scene, u: Sequence[float]) -> str:
    """Two objects: a relation in one sentence or two, or both side by side."""
    things = _shuffled(scene.things, u[3])
    first, second = (_described(thing, u[1], u[4 + i]) for i, thing in enumerate(things))
    how = _related(things, u[2])
    if how is None:
        return f"{first} {_pick(JOINTS, u[6])} {second}"
    if u[6] < 0.6:
        return f"{first} {_pick(RELATIONS[how], u[6] / 0.6)} {second}"
    place = _pick(PLACES[OPPOSITE[how]], (u[6] - 0.6) / 0.4)
    return f"{first}. {place} is {second}" if u[5] < 0.5 else f"{first}. {second} is {place}"


def _counted(scene: Scene, u: Sequence[float]) -> str:
    """Equal objects with their number as a word or a numeral."""
    n, thing, colored = len(scene.things), scene.things[0], u[1] < COLORED
    number = NUMBERS[n] if u[3] < 0.6 else str(n)
    plain, full = _name(thing, False, several=True), _name(thing, colored, several=True)
    if colored and u[4] < 0.3:
        after = (f"{plain} in {thing.color}", f"{plain} of {thing.color} color", f"{plain} that are {thing.color}")
        return f"{number} {_pick(after, u[4] / 0.3)}"
    forms = (f"{number} {full}", f"a group of {number} {full}", f"{full}, {number} of them", f"exactly {number} {full}")
    return _pick(forms, u[5])


def _listed(scene: Scene, u: Sequence[float]) -> str:
    """One object, or three and more in any order."""
    things = _shuffled(scene.things, u[3])
    spread = [(u[4] + i * u[5]) % 1 for i in range(len(things))]
    return _enumerated([_described(t, u[1], v) for t, v in zip(things, spread, strict=True)], _pick(JOINTS, u[6]))


def _described(thing: Thing, color: float, form: float) -> str:
    """The object with its article; its colour before or after it, if it is named."""
    if color >= COLORED:
        return article(thing.shape)
    after = (f"in {thing.color}", f"that is {thing.color}", f"of {thing.color} color", f"colored {thing.color}")
    return (
        article(f"{thing.color} {thing.shape}")
        if form < 0.6
        else (f"{article(thing.shape)} {_pick(after, (form - 0.6) / 0.4)}")
    )


def _name(thing: Thing, colored: bool, several: bool = False) -> str:
    shape = plural(thing.shape) if several else thing.shape
    return f"{thing.color} {shape}" if colored else shape


def _related(things: Sequence[Thing], u: float) -> str | None:
    """The relation of the first of two objects to the second, for a share of the pairs that have a clear one."""
    return relation(*things) if len(things) == 2 and u < RELATED else None


def _shuffled(things: Sequence[Thing], u: float) -> list[Thing]:
    """The objects in one of their orders."""
    rest, order = list(things), []
    while rest:
        u *= len(rest)
        order.append(rest.pop(int(u)))
        u -= int(u)
    return order


def _enumerated(names: Sequence[str], joint: str) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {joint} {names[-1]}"


def _pick(options: Sequence[str], u: float) -> str:
    return options[min(int(u * len(options)), len(options) - 1)]
