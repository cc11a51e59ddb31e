"""Controls of the exact score: right scenes for its rows, and changes that make them wrong.

A right scene is drawn for a row with colours, places and sizes of the embedded world. Images are (3, S, S) uint8, S a
multiple of 64.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sana_lab.shapes import scenes as world
from sana_lab.shapes.detector import Analysis
from sana_lab.shapes.exact import judge
from sana_lab.shapes.scenes import BACKGROUND, KINDS, SHAPES, Scene, Scenes, Thing
from sana_lab.types import Json

Picture = NDArray[np.uint8]
Things = tuple[Thing, ...]

FIVE = ((0.17, 0.17), (0.83, 0.17), (0.17, 0.83), (0.83, 0.83), (0.5, 0.5))
"""Centres of up to five small objects that do not touch."""
PLACES = {"left of": (1, 0), "right of": (0, 1), "above": (2, 0), "below": (0, 2)}
"""Relation -> indices into FIVE of its target and of the object that has the relation to it."""
SMALL = float(world.RADII.min())
TRIES = 1000  # scenes to look for one of a row's relation


class Control(NamedTuple):
    """One change of right scenes."""

    right: bool  # whether its images are still right
    change: Callable[[Json, Things], Things | None] = lambda row, things: things  # None: not for this row
    spoil: Callable[[Picture], Picture] = lambda image: image
    other_caption: bool = False  # judge by another row of the same task, which is not true of the scene


def right_things(row: Json, i: int) -> Things:
    """Objects that a row asks for, its relation as clear as in the world's captions; other ones for each i.

    ValueError if no scene has the relation.
    """
    names = [(need["class"], need.get("color")) for need in row["include"] for _ in range(need["count"])]
    kind = {1: "single", 2: "pair"}.get(len(names), "count")
    where = row["include"][-1].get("position", [None])[0]
    for index in range(TRIES):
        layout = world.scene(world.scenes(i, [index], [float(kind == k) for k in KINDS]), 0).things
        if len(layout) == len(names):
            things = tuple(
                t._replace(shape=name, color=color or t.color) for (name, color), t in zip(names, layout, strict=True)
            )
            if where in (None, world.relation(things[-1], things[0])):
                return things
    raise ValueError(f"none of {TRIES} scenes is right for {row['prompt']!r}")


def draw(things: Sequence[Thing], size: int) -> Picture:
    """An image of any number of objects that do not touch."""
    single = world.render(_single(things), size).astype(np.int64)
    ground = np.array(BACKGROUND)[:, None, None]
    return (ground + (single - ground).sum(0)).astype(np.uint8)


def images(control: Control, rows: Sequence[Json], size: int) -> Iterator[tuple[Picture, Json]]:
    """Images of a control with the rows to judge them by; rows to which it does not apply are left out."""
    for i, row in enumerate(rows):
        things = control.change(row, right_things(row, i))
        caption = _wrong_row(rows, i, things) if control.other_caption and things is not None else row
        if things is not None and caption is not None:
            yield control.spoil(draw(things, size)), caption


def _single(things: Sequence[Thing]) -> Scenes:
    """A scene for each thing."""
    return Scenes(
        np.zeros(len(things), np.int64),
        np.ones(len(things), np.int64),
        np.array([[SHAPES.index(t.shape)] for t in things]),
        np.array([[world.COLORS.index(t.color)] for t in things]),
        np.array([[t.center] for t in things], np.float32),
        np.array([[t.radius] for t in things], np.float32),
    )


def _wrong_row(rows: Sequence[Json], i: int, things: Things) -> Json | None:
    """The next row of the same task that is not true of the things; a scene of a circle is right for several."""
    truth = Analysis(tuple(world.objects(Scene("mixed", things), 64)), 0)
    others = (rows[(i + k) % len(rows)] for k in range(1, len(rows)))
    return next((row for row in others if row["tag"] == rows[i]["tag"] and not judge(truth, row)[0]), None)


# --- changes --------------------------------------------------------------------------------------------------------


def one_more(row: Json, things: Things) -> Things:
    """A further object of a class that is not asked for between the others, all small; nothing else is wrong."""
    shape = next(shape for shape in SHAPES if shape not in {thing.shape for thing in things})
    further = Thing(shape, "black", FIVE[-1], SMALL)
    corners = PLACES.get(row["include"][-1].get("position", [None])[0], (0, 1, 2, 3))
    kept = (t._replace(center=FIVE[k], radius=SMALL) for t, k in zip(things, corners, strict=False))
    return (*kept, further)


def one_fewer(row: Json, things: Things) -> Things:
    """Without the first object; a single one gets another shape."""
    return things[1:] or (things[0]._replace(shape=SHAPES[SHAPES.index(things[0].shape) - 1]),)


def recounted(row: Json, things: Things) -> Things | None:
    """Four for two, two for three, three for four."""
    if row["tag"] != "counting":
        return None
    number = {2: 4, 3: 2, 4: 3}[len(things)]
    return tuple(things[0]._replace(center=FIVE[k], radius=SMALL) for k in range(number))


def exchanged(row: Json, things: Things) -> Things | None:
    """Two objects of a relation in each other's places, two of named colours with each other's colours."""
    if row["tag"] == "position":
        a, b = things
        return a._replace(center=b.center), b._replace(center=a.center)
    if row["tag"] == "color_attr":
        a, b = things
        return a._replace(color=b.color), b._replace(color=a.color)
    return None


def with_block(image: Picture) -> Picture:
    """With a black block of 4 x 4 px at 64 px, less than a quarter of the smallest object, on the background."""
    scale = image.shape[-1] // 64
    ground = (image == np.array(BACKGROUND)[:, None, None]).all(0)
    blocks = np.lib.stride_tricks.sliding_window_view(ground, (4 * scale, 4 * scale))[::scale, ::scale]
    places = np.argwhere(np.all(blocks, axis=(2, 3)))
    y, x = places[len(places) // 2] * scale
    image = image.copy()
    image[:, y : y + 4 * scale, x : x + 4 * scale] = 0
    return image


def tinted(image: Picture) -> Picture:
    """A tenth more red and a tenth less blue."""
    return (image * np.array([1.1, 1.0, 0.9])[:, None, None]).clip(0, 255).astype(np.uint8)


def jpeg(image: Picture, quality: int = 75) -> Picture:
    """After JPEG."""
    file = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(file, "JPEG", quality=quality)
    return np.array(Image.open(file)).transpose(2, 0, 1)


def noisy(image: Picture, deviation: float = 10) -> Picture:
    """With Gaussian noise, of 255."""
    noise = np.random.default_rng(int(image.sum())).normal(0, deviation, image.shape)
    return (image + noise).round().clip(0, 255).astype(np.uint8)


CONTROLS: dict[str, Control] = {
    "right scenes": Control(True),
    "right, JPEG 75": Control(True, spoil=jpeg),
    "right, noise of 10 of 255": Control(True, spoil=noisy),
    "wrong caption": Control(False, other_caption=True),
    "one object more": Control(False, one_more),
    "one object fewer": Control(False, one_fewer),
    "wrong count": Control(False, recounted),
    "two objects or colours exchanged": Control(False, exchanged),
    "debris of 16 px": Control(False, spoil=with_block),
    "tinted": Control(False, spoil=tinted),
}
"""Name in tables -> control."""
