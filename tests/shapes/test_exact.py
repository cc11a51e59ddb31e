"""The exact score: true scenes pass, anything missing, further or left over fails, with its reason."""

import io
import json
from collections import Counter

import numpy as np
import pytest
import tiny_world
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from tiny_world import pack

from sana_lab.config import experiments
from sana_lab.config.specs import SpecError
from sana_lab.evaluation.geneval.measure import GenEval
from sana_lab.evaluation.geneval.prompts import prompts
from sana_lab.evaluation.geneval.vocabulary import TASKS
from sana_lab.intervals import Estimate
from sana_lab.shapes import debris, detector
from sana_lab.shapes import scenes as world
from sana_lab.shapes.exact import ExactShapes, judge
from sana_lab.shapes.scenes import Scene, Thing
from sana_lab.types import Json

Picture = NDArray[np.uint8]

CIRCLE, SQUARE = Thing("circle", "red", (0.25, 0.5), 10 / 64), Thing("square", "blue", (0.72, 0.5), 10 / 64)
PAIR_ROW: Json = {
    "tag": "position",
    "include": [{"class": "square", "count": 1}, {"class": "circle", "count": 1, "position": ["left of", 0]}],
    "prompt": "a photo of a circle left of a square",
}


def row_of(scene: Scene) -> Json:
    """A row that asks for the objects of a scene, with their colours."""
    counts = Counter((thing.shape, thing.color) for thing in scene.things)
    return {
        "tag": "counting",
        "include": [{"class": shape, "count": n, "color": color} for (shape, color), n in counts.items()],
    }


def draw(*things: Thing, size: int = 64) -> Picture:
    return world.render(pack([Scene("mixed", things)]), size)[0]


def verdict(image: Picture, row: Json) -> tuple[bool, str]:
    return judge(detector.analyse(image), row)


def share(images: NDArray[np.uint8], rows: world.Scenes) -> float:
    """Share of images judged exact by the rows of their scenes."""
    return float(np.mean([verdict(x, row_of(world.scene(rows, i)))[0] for i, x in enumerate(images)]))


def jpeg(image: Picture, quality: int) -> Picture:
    file = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(file, "JPEG", quality=quality)
    return np.array(Image.open(file)).transpose(2, 0, 1)


def noisy(image: Picture, sigma: float) -> Picture:
    noise = np.random.default_rng(int(image.sum())).normal(0, sigma, image.shape)
    return (image + noise).round().clip(0, 255).astype(np.uint8)


class TestTrueScenes:
    @pytest.mark.parametrize("size", [64, 128, 256])
    def test_clean(self, size: int) -> None:
        rows = world.scenes(21, range(200 if size < 256 else 60))
        assert share(world.render(rows, size), rows) == 1

    def test_small_spoils(self) -> None:
        rows = world.scenes(22, range(100))
        clean = world.render(rows, 64)
        assert share(np.stack([noisy(x, 10) for x in clean]), rows) == 1
        assert share(np.stack([jpeg(x, 75) for x in clean]), rows) == 1
        assert share(ndimage.gaussian_filter(clean.astype(float), (0, 0, 1, 1)).round().astype(np.uint8), rows) == 1


class TestWrong:
    def test_a_true_pair_is_exact_and_its_exchange_is_not(self) -> None:
        assert verdict(draw(CIRCLE, SQUARE), PAIR_ROW) == (True, "")
        exchanged = draw(CIRCLE._replace(center=SQUARE.center), SQUARE._replace(center=CIRCLE.center))
        assert verdict(exchanged, PAIR_ROW) == (False, "expected circle left of square, found right of")

    def test_one_object_more(self) -> None:
        third = Thing("cross", "black", (0.5, 0.82), 8 / 64)
        assert verdict(draw(CIRCLE, SQUARE, third), PAIR_ROW) == (False, "expected nothing else, found black cross")

    def test_one_of_a_class_more(self) -> None:
        more = Thing("circle", "green", (0.25, 0.15), 8 / 64)
        right, reason = verdict(draw(CIRCLE, SQUARE, more), PAIR_ROW)
        assert not right
        assert "expected nothing else, found green circle" in reason

    def test_an_object_missing(self) -> None:
        right, reason = verdict(draw(SQUARE), PAIR_ROW)
        assert not right
        assert "expected 1 circle, found 0" in reason

    def test_a_wrong_color(self) -> None:
        row = row_of(Scene("pair", (CIRCLE, SQUARE._replace(color="green"))))
        assert verdict(draw(CIRCLE, SQUARE), row) == (False, "expected 1 green square, found blue")


def quarter() -> int:
    """Side of a square of at most a quarter of the smallest object's area."""
    return int((min(map(world.smallest_area, world.SHAPES)) * 64**2 / 4) ** 0.5)


class TestDebris:
    def test_a_quarter_of_the_smallest_object_is_more_than_the_limit(self) -> None:
        smallest = min(map(world.smallest_area, world.SHAPES)) * 64**2
        assert debris.LIMIT < smallest / 4 < 20

    @pytest.mark.parametrize("color", world.COLORS)
    @pytest.mark.parametrize("size", [64, 128])
    def test_a_block_in_any_color(self, color: str, size: int) -> None:
        image, times = draw(CIRCLE, SQUARE, size=size), size // 64
        side = quarter() * times
        image[:, 2 : 2 + side, 30 : 30 + side] = np.array(world.PALETTE[color])[:, None, None]
        right, reason = verdict(image, PAIR_ROW)
        assert not right
        assert reason.startswith("expected at most 12 px of debris, found ")

    def test_specks_count_together(self) -> None:
        image = draw(CIRCLE, SQUARE)
        for i in range(4):
            image[:, 3:5, 5 + 12 * i : 7 + 12 * i] = 0
        assert not verdict(image, PAIR_ROW)[0]

    def test_a_hole_in_an_object(self) -> None:
        image = draw(CIRCLE, SQUARE)
        image[:, 30:34, 44:48] = np.array(world.BACKGROUND)[:, None, None]
        assert not verdict(image, PAIR_ROW)[0]

    @pytest.mark.parametrize("tint", [(1.2, 1, 1), (1.1, 1, 0.9), (0.85, 0.85, 0.85)], ids=["red", "warm", "dark"])
    def test_a_tint(self, tint: tuple[float, float, float]) -> None:
        image = draw(CIRCLE, SQUARE) * np.array(tint)[:, None, None]
        right, reason = verdict(image.clip(0, 255).astype(np.uint8), PAIR_ROW)
        assert not right
        assert int(reason.split()[-1]) > 1000, "all of the background differs"

    def test_noise_and_a_plain_image(self) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (3, 64, 64)).astype(np.uint8)
        for image in (noise, np.full((3, 64, 64), 20, np.uint8)):
            assert detector.analyse(image).debris > 1000


def _half(estimate: Estimate) -> float:
    assert estimate.low is not None
    assert estimate.high is not None
    return (estimate.high - estimate.low) / 2


def test_an_image_is_analysed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    image = draw(CIRCLE, SQUARE, size=65)
    first = detector.analyse(image)
    monkeypatch.setattr(detector, "measure", None)
    assert detector.analyse(torch.from_numpy(image)) is first
    assert detector.ShapesDetector().detect(image) == list(first.objects)


class TestMeasure:
    def filled(self, rows: list[Json] | None = None) -> ExactShapes:
        measure = ExactShapes(prompts_per_task=4, images_per_prompt=2)
        for row in rows or measure.rows:
            indices = [sum(map(ord, row["prompt"])) + k for k in range(2)]
            measure.add(tiny_world.images(5, indices), [row] * 2)
        return measure

    def test_rows_and_noise_are_those_of_geneval(self) -> None:
        measure, other = ExactShapes(prompts_per_task=4), GenEval(prompts_per_task=4)
        assert measure.rows == other.rows == prompts(4, seed=43, classes=world.SHAPES)
        assert measure.images_per_prompt == other.images_per_prompt

    def test_the_report(self) -> None:
        measure = self.filled()
        report = measure.report()
        assert set(report.values) >= {"exact", *(f"exact_{task}" for task in TASKS)}
        assert report.values["exact"].value == pytest.approx(np.mean(report.per_image["exact"]))
        assert report.values["exact"].n == 24
        assert report.settings["debris"] == {**debris.constants(), "side": 64}
        assert json.loads(json.dumps(report.settings)) == report.settings
        assert measure.details()["exact"]["overall"] == report.values["exact"].value

    def test_exact_images_are_right_by_geneval(self) -> None:
        measure, geneval = self.filled(), GenEval(prompts_per_task=4, images_per_prompt=2)
        for row in geneval.rows:
            indices = [sum(map(ord, row["prompt"])) + k for k in range(2)]
            geneval.add(tiny_world.images(5, indices), [row] * 2)
        pairs = zip(measure.verdicts.items, geneval.verdicts.items, strict=True)
        assert all(loose[1] or not exact[1] for exact, loose in pairs)

    def test_filled_tasks_are_whole_and_images_of_a_prompt_come_together(self) -> None:
        measure = ExactShapes(prompts_per_task=6, images_per_prompt=1, fill_tasks=True)
        assert [sum(row["tag"] == task for row in measure.rows) for task in TASKS] == [8, 6, 6, 6, 6, 6]
        for row in measure.rows:
            measure.add(tiny_world.images(5, [0]), [row])
        report = measure.report()
        assert "exact" in report.values
        assert len(report.per_image["exact"]) == len(measure.rows) == 38
        assert [len(outcome["correct"]) for outcome in measure.outcomes()][:5] == [2, 2, 2, 2, 1]
        assert report.settings["interval"].endswith("over images in single_object, all prompts")

    @pytest.mark.parametrize(("suite", "overall", "task"), [("shapes", 0.04, 1.0), ("shapes_full", 0.02, 0.04)])
    @pytest.mark.parametrize("chance", [0.5, 0.85])
    def test_intervals_of_the_suites(self, suite: str, overall: float, task: float, chance: float) -> None:
        """Of images that are right by chance, which varies between the prompts that are a sample."""
        options = experiments.load("shapes", [f"eval={suite}"])["eval"]
        keys = ("prompts_per_task", "images_per_prompt", "seed", "fill_tasks")
        measure, rng = ExactShapes(**{key: options[key] for key in keys}), np.random.default_rng(0)
        for row in measure.rows:
            measure.verdicts.add(measure.verdicts.match(row)[0], bool(rng.random() < chance), "")
        values = measure.report().values
        assert _half(values["exact"]) < overall
        assert max(_half(values[f"exact_{name}"]) for name in TASKS) < task

    def test_a_part_is_never_called_the_whole(self) -> None:
        report = self.filled(list(ExactShapes(prompts_per_task=4).rows[:-1])).report()
        assert "exact" not in report.values
        assert "exact_partial" in report.values

    def test_images_without_rows_are_refused(self) -> None:
        with pytest.raises(SpecError, match="exact_shapes needs images in GenEval's layout"):
            ExactShapes().check_rows([{"prompt": "a circle"}])
