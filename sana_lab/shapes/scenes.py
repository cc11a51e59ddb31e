"""The embedded world: scenes of flat shapes on grey, functions of (seed, index), with true captions.

Legend: B scenes, M = 4 object slots, S image side. Lengths are fractions of the image side, y points down. Every random
number is a hash of (seed, index, slot), so a scene does not depend on batch, order or number of workers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sana_lab.evaluation.geneval.vocabulary import COLORS, NUMBERS, article, plural
from sana_lab.types import Object

SHAPES = ("circle", "square", "triangle", "cross")
PALETTE = {  # COLORS in sRGB, 36 or more apart in Lab from each other and the background
    "red": (220, 20, 30),
    "orange": (255, 135, 0),
    "yellow": (255, 235, 40),
    "green": (20, 150, 50),
    "blue": (25, 60, 230),
    "purple": (130, 20, 160),
    "pink": (255, 160, 215),
    "brown": (105, 55, 15),
    "black": (0, 0, 0),
    "white": (255, 255, 255),
}
BACKGROUND = (153, 153, 153)
KINDS = ("single", "pair", "count", "mixed")  # one object; two classes; 2-4 equal objects; 3-4 classes

MAX_OBJECTS = 4
GAP = 3 / 64  # between the circles around two objects
RADII = np.array([[9, 15], [8.5, 13], [8, 11], [7.5, 10]]) / 64  # smallest and largest, for 1, 2, 3, 4 objects
SHARES = (0.25, 0.40, 0.27, 0.08)  # of KINDS
_TRIES = 12  # candidate positions per object before falling back to the 2 x 2 layout

Float = NDArray[np.float32]
Int = NDArray[np.int64]


class Scenes(NamedTuple):
    """A batch of scenes; slots from `count` on are empty."""

    kind: Int  # (B,) into KINDS
    count: Int  # type: ignore[assignment]  # (B,) 1 to 4; a tuple's method has this name too
    shape: Int  # (B, M) into SHAPES
    color: Int  # (B, M) into COLORS
    center: Float  # (B, M, 2) x, y
    radius: Float  # (B, M) of the circle around the object


class Thing(NamedTuple):
    """One object of one scene."""

    shape: str
    color: str
    center: tuple[float, float]
    radius: float


class Scene(NamedTuple):
    """Contents of one image."""

    kind: str
    things: tuple[Thing, ...]


# --- random numbers -------------------------------------------------------------------------------------------------


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniform(seed: int, indices: Sequence[int] | Int, slots: int, stream: int = 0) -> NDArray[np.float64]:
    """(B, slots) numbers in [0, 1) that depend only on (seed, index, slot, stream)."""
    step = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        key = _mix(np.array([seed % 2**64], np.uint64) + step * np.uint64(stream + 1))
        rows = _mix(key ^ _mix(np.asarray(indices, np.int64).astype(np.uint64) + step))
        bits = _mix(rows[:, None] + step * np.arange(1, slots + 1, dtype=np.uint64))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


# --- layout ---------------------------------------------------------------------------------------------------------


def scenes(seed: int, indices: Sequence[int] | Int, shares: Sequence[float] = SHARES) -> Scenes:
    """The scenes of a seed with these indices; `shares` are the probabilities of KINDS."""
    u = uniform(seed, indices, 4 + 3 * MAX_OBJECTS)
    kind = np.searchsorted(np.cumsum(shares)[:-1], u[:, 0], side="right")
    count = _counts(kind, u[:, 1])
    shape, color = _classes(kind, u[:, 4 : 4 + 2 * MAX_OBJECTS])
    smallest, largest = np.moveaxis(RADII[count - 1], -1, 0)
    radius = smallest[:, None] + u[:, -MAX_OBJECTS:] * (largest - smallest)[:, None]
    center = _place(uniform(seed, indices, MAX_OBJECTS * (_TRIES + 2) * 2, stream=1), radius, count)
    return Scenes(kind, count, shape, color, center.astype(np.float32), radius.astype(np.float32))


def _counts(kind: Int, u: NDArray[np.float64]) -> Int:
    several = 2 + (u * 3).astype(np.int64)
    mixed = 3 + (u * 2).astype(np.int64)
    return np.choose(kind, [np.ones_like(kind), np.full_like(kind, 2), several, mixed])


def _classes(kind: Int, u: NDArray[np.float64]) -> tuple[Int, Int]:
    """Shapes differ within a scene and colours are independent, except that a counted scene has equal objects."""
    shape = np.argsort(u[:, : len(SHAPES)], axis=1)[:, :MAX_OBJECTS]
    color = (u[:, MAX_OBJECTS:] * len(COLORS)).astype(np.int64)
    same = (kind == KINDS.index("count"))[:, None]
    return np.where(same, shape[:, :1], shape), np.where(same, color[:, :1], color)


def _place(u: NDArray[np.float64], radius: NDArray[np.float64], count: Int) -> NDArray[np.float64]:
    """Centres (B, M, 2): each object's first candidate with a GAP to earlier objects; the cell layout if none has."""
    u = u.reshape(len(u), MAX_OBJECTS, _TRIES + 2, 2)
    margin = radius + 1 / 64
    candidates = margin[..., None, None] + u[:, :, :_TRIES] * (1 - 2 * margin)[..., None, None]
    center, stuck = candidates[:, :, 0].copy(), np.zeros(len(u), bool)
    for i in range(1, MAX_OBJECTS):
        distances = np.linalg.norm(candidates[:, i, :, None] - center[:, None, :i], axis=-1)
        clear = (distances > (radius[:, i, None] + radius[:, :i] + GAP)[:, None]).all(-1)
        center[:, i] = np.take_along_axis(candidates[:, i], clear.argmax(1)[:, None, None], 1)[:, 0]
        stuck |= ~clear.any(1) & (i < count)
    return np.where(stuck[:, None, None], _cells(u[:, :, _TRIES:], radius), center)


def _cells(u: NDArray[np.float64], radius: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centres in the image's four quarters, in random order, jittered as far as the gap allows."""
    order = np.argsort(u[:, :, 0, 0], axis=1)
    middle = 0.25 + 0.5 * np.stack([order % 2, order // 2], -1)
    return middle + (2 * u[:, :, 1] - 1) * np.maximum(0.25 - radius - GAP / 2, 0)[..., None]


def scene(row: Scenes, i: int) -> Scene:
    """Scene i of a batch, with names of kind, shapes and colours."""
    things = zip(
        row.shape[i].tolist(), row.color[i].tolist(), row.center[i].tolist(), row.radius[i].tolist(), strict=True
    )
    slots = tuple(Thing(SHAPES[s], COLORS[c], (x, y), r) for s, c, (x, y), r in things)
    return Scene(KINDS[row.kind[i]], slots[: int(row.count[i])])


# --- rendering ------------------------------------------------------------------------------------------------------


def distance(shape: int, x: Float, y: Float, r: Float) -> Float:
    """Signed distance to a shape inscribed in a circle of radius r; a bound that is exact at the middle of edges."""
    if SHAPES[shape] == "circle":
        return np.hypot(x, y) - r
    if SHAPES[shape] == "square":
        return np.maximum(np.abs(x), np.abs(y)) - r * np.float32(0.5**0.5)
    if SHAPES[shape] == "triangle":
        return np.maximum(y, np.float32(0.75**0.5) * np.abs(x) - np.float32(0.5) * y) - np.float32(0.5) * r
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - np.float32(0.94) * r, np.minimum(x, y) - np.float32(0.34) * r)


def render(rows: Scenes, size: int) -> NDArray[np.uint8]:
    """(B, 3, S, S) images with antialiased edges."""
    colors = np.array(list(PALETTE.values()), np.float32)
    ground = np.array(BACKGROUND, np.float32)
    images = np.full((len(rows.count), size, size, 3), BACKGROUND, np.uint8)
    scene_of, slot = np.nonzero(np.arange(MAX_OBJECTS) < rows.count[:, None])
    for kind in range(len(SHAPES)):
        mask = rows.shape[scene_of, slot] == kind
        b, m = scene_of[mask], slot[mask]
        ys, xs, cover = _window(kind, rows.center[b, m] * size, rows.radius[b, m] * size, size)
        inside = cover > 0
        which = np.broadcast_to(np.arange(len(b))[:, None, None], cover.shape)[inside]
        paint = ground + cover[inside][:, None] * (colors[rows.color[b, m]] - ground)[which]
        images[b[which], np.broadcast_to(ys, cover.shape)[inside], np.broadcast_to(xs, cover.shape)[inside]] = (
            paint + 0.5
        )
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def _window(kind: int, center: Float, radius: Float, size: int) -> tuple[Int, Int, Float]:
    """Rows (n, w, 1), columns (n, 1, w) and coverage (n, w, w) in [0, 1] of the pixels around n objects."""
    reach = int(np.ceil(radius.max(initial=0))) + 1
    near = np.floor(center).astype(np.int64)[:, None] + np.arange(-reach, reach + 1)[None, :, None]
    x, y = np.moveaxis(near + np.float32(0.5) - center[:, None], -1, 0).astype(np.float32)
    d = distance(kind, x[:, None, :], y[:, :, None], radius[:, None, None])
    inside = (near >= 0) & (near < size)
    cover = np.clip(0.5 - d, 0, 1) * (inside[:, None, :, 0] & inside[:, :, None, 1])
    return near[:, :, None, 1], near[:, None, :, 0], cover


# --- ground truth ---------------------------------------------------------------------------------------------------


def box(thing: Thing, size: int) -> tuple[float, float, float, float]:
    """Bounding box x0, y0, x1, y1 of an object in pixels."""
    (x, y), r = thing.center, thing.radius
    half_width, up, down = {
        "circle": (1, 1, 1),
        "square": (0.5**0.5,) * 3,
        "triangle": (0.75**0.5, 1, 0.5),
        "cross": (0.94,) * 3,
    }[thing.shape]
    return (x - half_width * r) * size, (y - up * r) * size, (x + half_width * r) * size, (y + down * r) * size


def area(thing: Thing) -> float:
    """The fraction of the image that an object covers."""
    return unit_area(thing.shape) * thing.radius**2


def unit_area(shape: str) -> float:
    """The area of a shape in a circle of radius 1."""
    return _UNIT_AREA[shape]


def smallest_area(shape: str) -> float:
    """The fraction of the image that the smallest object of a shape covers."""
    return unit_area(shape) * float(RADII.min()) ** 2


_UNIT_AREA = {
    "circle": np.pi,
    "square": 2,
    "triangle": 0.75 * 3**0.5,
    "cross": 8 * 0.94 * 0.34 - 4 * 0.34**2,
}  # radius 1


def objects(row: Scene, size: int) -> list[Object]:
    """Detections of a perfect detector, the largest first; an object's score is its area."""
    return sorted((Object(t.shape, box(t, size), area(t), t.color) for t in row.things), key=lambda o: -o.score)


# --- captions -------------------------------------------------------------------------------------------------------

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def relation(a: Thing, b: Thing) -> str | None:
    """Position of a relative to b if one direction clearly dominates, else None; stricter than GenEval's rule."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = box(a, 1), box(b, 1)
    dx, dy = (ax0 + ax1 - bx0 - bx1) / 2, (ay0 + ay1 - by0 - by1) / 2
    if abs(dx) > 1.5 * abs(dy):
        return "left of" if dx < 0 else "right of"
    if abs(dy) > 1.5 * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def captions(row: Scene) -> list[str]:
    """All captions of a scene, in GenEval's patterns, with and without its prefix; each names every object."""
    if row.kind == "pair":
        phrases = _pair(*row.things)
    elif row.kind == "count":
        phrases = _counted(row.things)
    else:
        phrases = [_listed([article(t.shape) for t in row.things]), _listed([article(_full(t)) for t in row.things])]
    return [prefix + phrase for phrase in phrases for prefix in ("a photo of ", "")]


def _full(thing: Thing) -> str:
    return f"{thing.color} {thing.shape}"


def _listed(nouns: list[str]) -> str:
    return nouns[0] if len(nouns) == 1 else f"{', '.join(nouns[:-1])} and {nouns[-1]}"


def _counted(things: tuple[Thing, ...]) -> list[str]:
    number, first = NUMBERS[len(things)], things[0]
    return [f"{number} {plural(first.shape)}", f"{number} {first.color} {plural(first.shape)}"]


def _pair(a: Thing, b: Thing) -> list[str]:
    where = relation(a, b)
    names = [(article(a.shape), article(b.shape)), (article(_full(a)), article(_full(b)))]
    together = [f"{x} and {y}" for p, q in names for x, y in ((p, q), (q, p))]
    if where is None:
        return together
    return together + [f"{x} {how} {y}" for p, q in names for x, how, y in ((p, where, q), (q, OPPOSITE[where], p))]


def prompts(rows: Scenes, seed: int, indices: Sequence[int] | Int, draw: int = 0) -> list[str]:
    """One caption of each scene, chosen by (seed, index, draw)."""
    u = uniform(seed, indices, 1, stream=2 + draw)[:, 0].tolist()
    options = (captions(scene(rows, i)) for i in range(len(u)))
    return [choice[int(x * len(choice))] for x, choice in zip(u, options, strict=True)]
