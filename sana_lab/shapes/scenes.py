"""The embedded world: flat shapes on grey, rendered from (seed, index) alone, with captions that are true of them.

Legend: B scenes, M = 4 object slots, S image side. Lengths are fractions of the image side, y points down. Every random
number is a hash of (seed, index, slot), so a scene does not depend on batch, order or number of workers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sana_lab.types import Object

SHAPES = ("circle", "square", "triangle", "cross")
PALETTE = {  # sRGB; the ten GenEval colours, 36 or more apart in Lab from each other and the background
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
COLORS = tuple(PALETTE)
BACKGROUND = (153, 153, 153)
KINDS = ("single", "pair", "count", "mixed")  # one object; two classes; 2-4 equal objects; 3-4 classes

MOST = 4
GAP = 3 / 64  # between the circles around two objects
RADII = np.array([[9, 15], [8.5, 13], [8, 11], [7.5, 10]]) / 64  # least and most, for 1, 2, 3, 4 objects
SHARES = (0.25, 0.40, 0.27, 0.08)  # of KINDS
_TRIES = 12  # candidate positions per object before the 2 x 2 layout is taken

Float = NDArray[np.float32]
Int = NDArray[np.int64]


class Scenes(NamedTuple):
    """A batch of scenes; slots at and after `count` hold nothing."""

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
    """What one image shows."""

    kind: str
    things: tuple[Thing, ...]


# --- random numbers -------------------------------------------------------------------------------------------------


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniform(seed: int, indices: Sequence[int] | Int, slots: int, stream: int = 0) -> NDArray[np.float64]:
    """(B, slots) numbers in [0, 1) that depend on (seed, index, slot, stream) alone."""
    step = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        key = _mix(np.array([seed % 2**64], np.uint64) + step * np.uint64(stream + 1))
        rows = _mix(key ^ _mix(np.asarray(indices, np.int64).astype(np.uint64) + step))
        bits = _mix(rows[:, None] + step * np.arange(1, slots + 1, dtype=np.uint64))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


# --- layout ---------------------------------------------------------------------------------------------------------


def scenes(seed: int, indices: Sequence[int] | Int, shares: Sequence[float] = SHARES) -> Scenes:
    """The scenes with these indices in the world of this seed, where kinds come with these shares."""
    u = uniform(seed, indices, 4 + 3 * MOST)
    kind = np.searchsorted(np.cumsum(shares)[:-1], u[:, 0], side="right")
    count = _counts(kind, u[:, 1])
    shape, color = _classes(kind, u[:, 4 : 4 + 2 * MOST])
    least, most = np.moveaxis(RADII[count - 1], -1, 0)
    radius = least[:, None] + u[:, -MOST:] * (most - least)[:, None]
    center = _place(uniform(seed, indices, MOST * (_TRIES + 2) * 2, stream=1), radius, count)
    return Scenes(kind, count, shape, color, center.astype(np.float32), radius.astype(np.float32))


def _counts(kind: Int, u: NDArray[np.float64]) -> Int:
    several = 2 + (u * 3).astype(np.int64)
    mixed = 3 + (u * 2).astype(np.int64)
    return np.choose(kind, [np.ones_like(kind), np.full_like(kind, 2), several, mixed])


def _classes(kind: Int, u: NDArray[np.float64]) -> tuple[Int, Int]:
    """Shapes differ within a scene and colours are free, except that a counted scene holds equal objects."""
    shape = np.argsort(u[:, : len(SHAPES)], axis=1)[:, :MOST]
    color = (u[:, MOST:] * len(COLORS)).astype(np.int64)
    same = (kind == KINDS.index("count"))[:, None]
    return np.where(same, shape[:, :1], shape), np.where(same, color[:, :1], color)


def _place(u: NDArray[np.float64], radius: NDArray[np.float64], count: Int) -> NDArray[np.float64]:
    """Centres (B, M, 2): each object takes its first candidate that clears the earlier ones; else all take cells."""
    u = u.reshape(len(u), MOST, _TRIES + 2, 2)
    room = radius + 1 / 64
    candidates = room[..., None, None] + u[:, :, :_TRIES] * (1 - 2 * room)[..., None, None]
    center, stuck = candidates[:, :, 0].copy(), np.zeros(len(u), bool)
    for i in range(1, MOST):
        away = np.linalg.norm(candidates[:, i, :, None] - center[:, None, :i], axis=-1)
        clear = (away > (radius[:, i, None] + radius[:, :i] + GAP)[:, None]).all(-1)
        center[:, i] = np.take_along_axis(candidates[:, i], clear.argmax(1)[:, None, None], 1)[:, 0]
        stuck |= ~clear.any(1) & (i < count)
    return np.where(stuck[:, None, None], _cells(u[:, :, _TRIES:], radius), center)


def _cells(u: NDArray[np.float64], radius: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centres in the four quarters of the image, in random order, as far from the middle of each as the gap allows."""
    order = np.argsort(u[:, :, 0, 0], axis=1)
    middle = 0.25 + 0.5 * np.stack([order % 2, order // 2], -1)
    return middle + (2 * u[:, :, 1] - 1) * np.maximum(0.25 - radius - GAP / 2, 0)[..., None]


def scene(row: Scenes, i: int) -> Scene:
    """Scene i of a batch, in words and fractions."""
    things = zip(
        row.shape[i].tolist(), row.color[i].tolist(), row.center[i].tolist(), row.radius[i].tolist(), strict=True
    )
    found = tuple(Thing(SHAPES[s], COLORS[c], (x, y), r) for s, c, (x, y), r in things)
    return Scene(KINDS[row.kind[i]], found[: int(row.count[i])])


def pack(rows: Sequence[Scene]) -> Scenes:
    """The inverse of `scene`: what to give `draw` for scenes made by hand."""
    blank = Thing(SHAPES[0], COLORS[0], (0.5, 0.5), 0.1)
    full = [(*row.things, *[blank] * (MOST - len(row.things))) for row in rows]
    return Scenes(
        np.array([KINDS.index(row.kind) for row in rows]),
        np.array([len(row.things) for row in rows]),
        np.array([[SHAPES.index(t.shape) for t in row] for row in full]),
        np.array([[COLORS.index(t.color) for t in row] for row in full]),
        np.array([[t.center for t in row] for row in full], np.float32),
        np.array([[t.radius for t in row] for row in full], np.float32),
    )


# --- pictures -------------------------------------------------------------------------------------------------------


def distance(shape: int, x: Float, y: Float, r: Float) -> Float:
    """Signed distance (or a bound that is exact at the edges' middles) to a shape inscribed in a circle of radius r."""
    if SHAPES[shape] == "circle":
        return np.hypot(x, y) - r
    if SHAPES[shape] == "square":
        return np.maximum(np.abs(x), np.abs(y)) - r * np.float32(0.5**0.5)
    if SHAPES[shape] == "triangle":
        return np.maximum(y, np.float32(0.75**0.5) * np.abs(x) - np.float32(0.5) * y) - np.float32(0.5) * r
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - np.float32(0.94) * r, np.minimum(x, y) - np.float32(0.34) * r)


def draw(rows: Scenes, size: int) -> NDArray[np.uint8]:
    """(B, 3, S, S) images with antialiased edges."""
    colors = np.array(list(PALETTE.values()), np.float32)
    ground = np.array(BACKGROUND, np.float32)
    images = np.full((len(rows.count), size, size, 3), BACKGROUND, np.uint8)
    scene_of, slot = np.nonzero(np.arange(MOST) < rows.count[:, None])
    for kind in range(len(SHAPES)):
        chosen = rows.shape[scene_of, slot] == kind
        b, m = scene_of[chosen], slot[chosen]
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
    ok = (near >= 0) & (near < size)
    cover = np.clip(0.5 - d, 0, 1) * (ok[:, None, :, 0] & ok[:, :, None, 1])
    return near[:, :, None, 1], near[:, None, :, 0], cover


def render_batch(seed: int, indices: Sequence[int] | Int, size: int = 64) -> NDArray[np.uint8]:
    """(B, 3, S, S) images of the scenes with these indices."""
    return draw(scenes(seed, indices), size)


def render(seed: int, index: int, size: int = 64) -> tuple[NDArray[np.uint8], Scene]:
    """One image (3, S, S) and what it shows."""
    rows = scenes(seed, [index])
    return draw(rows, size)[0], scene(rows, 0)


# --- truth ----------------------------------------------------------------------------------------------------------


def box(thing: Thing, size: int) -> tuple[float, float, float, float]:
    """x0, y0, x1, y1 in pixels of the rectangle around an object."""
    (x, y), r = thing.center, thing.radius
    wide, up, down = {
        "circle": (1, 1, 1),
        "square": (0.5**0.5,) * 3,
        "triangle": (0.75**0.5, 1, 0.5),
        "cross": (0.94,) * 3,
    }[thing.shape]
    return (x - wide * r) * size, (y - up * r) * size, (x + wide * r) * size, (y + down * r) * size


def share(thing: Thing) -> float:
    """How much of the picture an object covers, in [0, 1]."""
    return _AREA[thing.shape] * thing.radius**2


def least_share(shape: str) -> float:
    """How much of the picture the smallest object of a shape covers."""
    return _AREA[shape] * float(RADII.min()) ** 2


_AREA = {"circle": np.pi, "square": 2, "triangle": 0.75 * 3**0.5, "cross": 8 * 0.94 * 0.34 - 4 * 0.34**2}  # radius 1


def objects(row: Scene, size: int) -> list[Object]:
    """What a perfect judge sees: the largest object first, its share of the picture as the score."""
    found = [Object(t.shape, box(t, size), share(t), t.color) for t in row.things]
    return sorted(found, key=lambda o: -o.score)


# --- captions -------------------------------------------------------------------------------------------------------

NUMBERS = {2: "two", 3: "three", 4: "four"}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def article(noun: str) -> str:
    """'a red circle', 'an orange square'."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    """GenEval's rule: 'es' after an s, else 's'."""
    return noun + ("es" if noun.endswith("s") else "s")


def relation(a: Thing, b: Thing) -> str | None:
    """Where a lies as seen from b, when one direction clearly dominates; stricter than GenEval's own rule."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = box(a, 1), box(b, 1)
    dx, dy = (ax0 + ax1 - bx0 - bx1) / 2, (ay0 + ay1 - by0 - by1) / 2
    if abs(dx) > 1.5 * abs(dy):
        return "left of" if dx < 0 else "right of"
    if abs(dy) > 1.5 * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def captions(row: Scene) -> list[str]:
    """All captions of a scene, in GenEval's patterns and without its prefix; each is true and names every object."""
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
