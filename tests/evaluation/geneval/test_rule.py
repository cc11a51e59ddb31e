"""GenEval's decision rule, case by case, against the published rule on random scenes, and with an oracle on shapes."""

import numpy as np
import pytest
import torch
from tiny_world import images, pack
from torch import Tensor

from sana_lab.evaluation.geneval.detectors import Detector
from sana_lab.evaluation.geneval.measure import GenEval
from sana_lab.evaluation.geneval.prompts import prompts
from sana_lab.evaluation.geneval.rule import judge_row, relations, verdict
from sana_lab.evaluation.geneval.vocabulary import TASKS
from sana_lab.evaluation.run_measures import Generate, Source, run
from sana_lab.shapes import scenes as world
from sana_lab.shapes.detector import ShapesDetector
from sana_lab.types import Json, Object


def thing(
    label: str, x: float = 0, y: float = 0, score: float = 0.5, color: str | None = None, side: float = 10
) -> Object:
    return Object(label, (x - side / 2, y - side / 2, x + side / 2, y + side / 2), score, color)


@pytest.mark.parametrize(
    ("dx", "dy", "expected"),
    [
        (-30, 0, {"left of"}),
        (30, 0, {"right of"}),
        (0, -30, {"above"}),
        (0, 30, {"below"}),
        (30, 30, {"right of", "below"}),  # (28 / 42.4) on both axes: two hold at once
        (4.4, 4.4, {"right of", "below"} if 2.4 / (4.4 * 2**0.5) > 0.5 else set()),  # the shrunk offset, unshrunk norm
        (2, 0, set()),  # 2 - 0.1 * 20 = 0: nothing is left
        (2.0005, 2.0005, set()),  # less than 1e-3 is left
        (3, 0, set()),  # 1 / 3 is not more than 0.5
        (4.01, 0, {"right of"}),  # 2.01 / 4.01 is
        (60, 30, {"right of"}),  # 28 / 67.1 < 0.5
        (0, 0, set()),
    ],
)
def test_relations(dx: float, dy: float, expected: set[str]) -> None:
    assert relations(thing("a", dx, dy), thing("b")) == expected


def test_relations_shrink_by_both_boxes() -> None:
    assert relations(thing("a", 10, 0, side=10), thing("b", side=10)) == {"right of"}
    assert relations(thing("a", 10, 0, side=30), thing("b", side=30)) == set()  # 10 - 6 = 4; 4 / 10


RED_CIRCLE = {"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}]}
TWO = {"tag": "two_object", "include": [{"class": "circle", "count": 1}, {"class": "square", "count": 1}]}
THREE = {
    "tag": "counting",
    "include": [{"class": "circle", "count": 3}],
    "exclude": [{"class": "circle", "count": 4}],
}
LEFT = {
    "tag": "position",
    "include": [{"class": "square", "count": 1}, {"class": "circle", "count": 1, "position": ["left of", 0]}],
}
BOTH = {
    "tag": "color_attr",
    "include": [{"class": "circle", "count": 1, "color": "red"}, {"class": "square", "count": 1, "color": "blue"}],
}
TWO_RED = {"tag": "colors", "include": [{"class": "circle", "count": 2, "color": "red"}]}


@pytest.mark.parametrize(
    ("row", "objects", "expected"),
    [
        (RED_CIRCLE, [thing("circle", color="red")], ""),
        (RED_CIRCLE, [], "expected 1 circle, found 0"),
        (RED_CIRCLE, [thing("square", color="red")], "expected 1 circle, found 0"),
        # a right but less confident object does not rescue, and a wrong less confident one does not hurt
        (
            RED_CIRCLE,
            [thing("circle", color="red", score=0.4), thing("circle", color="blue")],
            "expected 1 red circle, found blue",
        ),
        (RED_CIRCLE, [thing("circle", color="blue", score=0.4), thing("circle", color="red")], ""),
        (RED_CIRCLE, [thing("circle", color=None)], "expected 1 red circle, found None"),
        (
            TWO_RED,
            [thing("circle", color="red"), thing("circle", color="blue")],
            "expected 2 red circle, found red, blue",
        ),
        # extra objects do not hurt outside counting
        (TWO, [thing("circle"), thing("circle"), thing("square"), thing("cross")], ""),
        (TWO, [thing("circle"), thing("circle")], "expected 1 square, found 0"),
        (THREE, [thing("circle")] * 3, ""),
        (THREE, [thing("circle")] * 3 + [thing("square")], ""),
        (THREE, [thing("circle")] * 2, "expected 3 circle, found 2"),
        (THREE, [thing("circle")] * 4, "expected fewer than 4 circle, found 4"),
        (LEFT, [thing("circle", 10, 30), thing("square", 50, 30)], ""),
        (LEFT, [thing("circle", 50, 30), thing("square", 10, 30)], "expected circle left of square, found right of"),
        (LEFT, [thing("circle", 30, 30), thing("square", 31, 31)], "expected circle left of square, found neither"),
        (LEFT, [thing("circle", 10, 30)], "expected 1 square, found 0; no target for circle to be left of"),
        # only the most confident circle and square count
        (LEFT, [thing("circle", 10, 30, 0.4), thing("circle", 60, 30), thing("square", 40, 30)], "found right of"),
        (LEFT, [thing("circle", 10, 30), thing("square", 2, 30, 0.4), thing("square", 50, 30)], ""),
        (BOTH, [thing("circle", color="red"), thing("square", color="blue")], ""),
        (
            BOTH,
            [thing("circle", color="blue"), thing("square", color="red")],
            "expected 1 red circle, found blue; expected 1 blue square, found red",
        ),
    ],
)
def test_decisions(row: Json, objects: list[Object], expected: str) -> None:
    right, reason = judge_row(objects, row)
    assert right == (not expected)
    assert reason.endswith(expected)
    assert bool(reason) != right


def test_a_target_of_the_wrong_color_is_no_target() -> None:
    row = {"tag": "position", "include": [{**LEFT["include"][0], "color": "blue"}, LEFT["include"][1]]}
    right, reason = judge_row([thing("circle", 10, 30), thing("square", 50, 30, color="red")], row)
    assert not right
    assert reason.endswith("no target for circle to be left of")


def relation_by_hand(a: Object, b: Object) -> list[str]:
    """Side by side with numbers only: the offset of middles, shrunk by a tenth of both sides, over the whole offset."""
    ax, ay, bx, by = ((o.box[i] + o.box[i + 2]) / 2 for o in (a, b) for i in (0, 1))
    dx, dy = ax - bx, ay - by
    widths = [o.box[2] - o.box[0] for o in (a, b)]
    heights = [o.box[3] - o.box[1] for o in (a, b)]
    left = max(abs(dx) - 0.1 * sum(widths), 0) * (1 if dx > 0 else -1)
    top = max(abs(dy) - 0.1 * sum(heights), 0) * (1 if dy > 0 else -1)
    if abs(left) < 1e-3 and abs(top) < 1e-3:
        return []
    length = (dx * dx + dy * dy) ** 0.5
    found = ["left of"] if left / length < -0.5 else []
    found += ["right of"] if left / length > 0.5 else []
    found += ["above"] if top / length < -0.5 else []
    return found + (["below"] if top / length > 0.5 else [])


def right_by_hand(objects: list[Object], row: Json) -> bool:
    """The published rule again, from its description, class by class."""
    seen: dict[str, list[Object]] = {}
    for o in objects:
        seen.setdefault(o.label, []).append(o)
    for group in seen.values():
        group.sort(key=lambda o: o.score, reverse=True)
        del group[16:]
    matched: list[list[Object]] = []
    correct = True
    for need in row["include"]:
        found = seen.get(need["class"], [])[: need["count"]]
        ok = len(found) >= need["count"]
        if ok and "color" in need:
            ok = [o.color for o in found].count(need["color"]) >= need["count"]
        if ok and "position" in need:
            where, target = need["position"]
            ok = bool(matched[target]) and all(where in relation_by_hand(a, b) for a in found for b in matched[target])
        matched.append(found if ok else [])
        correct = correct and ok
    for limit in row.get("exclude", []):
        correct = correct and len(seen.get(limit["class"], [])) < limit["count"]
    return correct


def random_scene(rng: np.random.Generator, row: Json) -> list[Object]:
    """Mostly what the row names, in the colours it names, so that about half of the scenes are right."""
    needs = [need for need in row["include"] for _ in range(need["count"])]
    kept = [need for need in needs if rng.random() < 0.93]
    kept += [needs[rng.integers(len(needs))] for _ in range(rng.choice([0, 0, 0, 1, 3]))]
    objects = []
    for need in kept:
        label = need["class"] if rng.random() < 0.97 else str(rng.choice(world.SHAPES))
        color = need.get("color") if rng.random() < 0.93 else str(rng.choice(world.COLORS))
        x, y = rng.uniform(0, 64, 2)
        if rng.random() < 0.7 and "position" in need:  # where it should be, as seen from the middle
            dx, dy = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}[need["position"][0]]
            x, y = 32 + 25 * dx, 32 + 25 * dy
        elif row["tag"] == "position" and rng.random() < 0.7:
            x, y = 32.0, 32.0
        w, h = rng.uniform(1, 20, 2)
        objects.append(Object(label, (x, y, x + w, y + h), float(rng.choice([0.2, 0.5, rng.random()])), color))
    return objects


def test_decisions_are_the_published_rules_on_12_000_random_scenes() -> None:
    rng, rows = np.random.default_rng(1), prompts(40, classes=world.SHAPES)
    outcomes: dict[str, list[bool]] = {task: [] for task in TASKS}
    for i in range(12_000):
        row = rows[i % len(rows)]
        objects = random_scene(rng, row)
        right = judge_row(objects, row)[0]
        assert right == right_by_hand(objects, row), (row, objects)
        outcomes[row["tag"]].append(right)
    assert all(0.2 < np.mean(found) < 0.95 for found in outcomes.values())


def test_no_more_than_16_of_a_class_are_looked_at() -> None:
    many = {
        "tag": "counting",
        "include": [{"class": "circle", "count": 16}],
        "exclude": [{"class": "circle", "count": 17}],
    }
    assert judge_row([thing("circle")] * 40, many)[0]


class Scripted(Detector):
    """Sees what it is told to."""

    labels, title, threshold, counting_threshold = ("circle", "square"), "scripted", 0.3, 0.9

    def __init__(self, objects: list[Object]) -> None:
        self.objects = objects

    def detect(self, image: Tensor) -> list[Object]:
        return self.objects

    def identity(self) -> Json:
        return {}


def test_thresholds_are_the_tasks_own() -> None:
    image, circles = torch.zeros(3, 8, 8), [thing("circle", score=s) for s in (0.95, 0.91, 0.91, 0.9, 0.3)]
    assert verdict(image, THREE, Scripted(circles)) == (True, "")
    one = {"tag": "single_object", "include": [{"class": "circle", "count": 4}]}
    assert verdict(image, one, Scripted(circles))[0]
    assert not verdict(image, {**one, "include": [{"class": "circle", "count": 5}]}, Scripted(circles))[0]


def test_colors_are_asked_for_what_the_rule_looks_at_and_no_more() -> None:
    asked: list[Object] = []

    def namer(image: Tensor, things: list[Object]) -> list[Object]:
        asked.extend(things)
        return [o._replace(color="red") for o in things]

    objects = [thing("circle", score=0.5), thing("circle", score=0.8), thing("square", score=0.9)]
    assert verdict(torch.zeros(3, 8, 8), RED_CIRCLE, Scripted(objects), namer) == (True, "")
    assert asked == [objects[1]]
    assert verdict(torch.zeros(3, 8, 8), TWO, Scripted(objects), namer) == (True, "")
    assert asked == [objects[1]]


# --- with the shapes detector


def scene_for(row: Json, rng: np.random.Generator) -> world.Scene:
    """A scene that meets a row: objects in cells, turned to the wanted relation; the rest is drawn at random."""
    needs = [need for need in row["include"] for _ in range(need["count"])]
    cells = {1: [(0.5, 0.5)], 2: [(0.25, 0.5), (0.75, 0.5)]}.get(
        len(needs), [(0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)]
    )
    where = next((need["position"][0] for need in needs if "position" in need), None)
    target = {"left of": (0.75, 0.5), "right of": (0.25, 0.5), "above": (0.5, 0.75), "below": (0.5, 0.25)}.get(where)
    if target is not None:
        cells = [target, (1 - target[0], 1 - target[1])]
    things = [
        world.Thing(need["class"], need.get("color") or str(rng.choice(world.COLORS)), center, rng.uniform(8, 11) / 64)
        for need, center in zip(needs, cells, strict=False)
    ]
    return world.Scene("mixed", tuple(things))


class Oracle:
    """Draws what each prompt asks for, and remembers how it was asked."""

    def __init__(self, rows: list[Json], size: int = 64) -> None:
        self.rows, self.size = {row["prompt"]: row for row in rows}, size
        self.indices: list[int] = []

    def __call__(self, texts: list[str], indices: list[int]) -> Tensor:
        self.indices += indices
        scenes = [scene_for(self.rows[text], np.random.default_rng(i)) for text, i in zip(texts, indices, strict=True)]
        return torch.from_numpy(world.render(pack(scenes), self.size))


def scored(generate: Generate, per_task: int, images_per_prompt: int = 2) -> tuple[float, float]:
    """GenEval of a generator, and the upper end of its interval."""
    measure = GenEval(prompts_per_task=per_task, images_per_prompt=images_per_prompt)
    value = run({"geneval": measure}, Source(generate), batch=32)["geneval"].values["geneval"]
    assert value.high is not None
    return value.value, value.high


def test_an_oracle_scores_one_and_chance_scores_low() -> None:
    oracle = Oracle(prompts(20, classes=world.SHAPES))
    perfect, _ = scored(oracle, 20)
    assert perfect >= 0.99
    assert oracle.indices == list(range(2 * len(oracle.rows)))
    chance, high = scored(lambda texts, indices: images(1, indices), 20)
    assert 0.02 < chance < 0.2
    assert high < perfect


def test_grey_images_score_nothing() -> None:
    grey = torch.full((1, 3, 64, 64), 153, dtype=torch.uint8)
    assert scored(lambda texts, indices: grey.expand(len(texts), -1, -1, -1), 3, 1)[0] == 0


def test_the_shapes_detector_gives_the_verdicts_of_the_ground_truth() -> None:
    rows, batch = prompts(30, classes=world.SHAPES), world.scenes(2, range(120))
    for i, image in enumerate(world.render(batch, 64)):
        detected, truth = ShapesDetector().detect(image), world.objects(world.scene(batch, i), 64)
        for row in rows:
            assert row["tag"] == "position" or judge_row(detected, row)[0] == judge_row(truth, row)[0]
