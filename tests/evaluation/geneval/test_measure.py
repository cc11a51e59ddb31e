"""GenEval as a measure: what it draws for, how it names what it found, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_folders
import tiny_world
import torch
from tiny_world import pack
from torch import Tensor

from sana_lab.config import specs
from sana_lab.config.specs import SpecError
from sana_lab.evaluation.geneval.measure import GenEval
from sana_lab.evaluation.geneval.prompts import coco_classes, prompts
from sana_lab.evaluation.geneval.summary import influences, summarise
from sana_lab.evaluation.geneval.vocabulary import TASKS
from sana_lab.intervals import cluster_bootstrap
from sana_lab.shapes import scenes as world
from sana_lab.types import Json


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    home = tmp_path_factory.mktemp("models")
    labels = coco_classes()
    return tiny_folders.mask2former(home / "mask2former", labels), tiny_folders.clip(home / "clip")


def drawn(row: Json, seed: int) -> Tensor:
    """One random picture of the world: chance is right about one in ten."""
    return tiny_world.images(seed, [sum(map(ord, row["prompt"])) + seed])[0]


def filled(measure: GenEval, rows: list[Json] | None = None) -> GenEval:
    for n, row in enumerate(measure.rows if rows is None else rows):
        pictures = [drawn(row, n + 1000 * k) for k in range(measure.images_per_prompt)]
        measure.add(torch.stack(pictures), [row] * measure.images_per_prompt)
    return measure


def test_the_whole_of_the_embedded_world() -> None:
    measure = filled(GenEval(prompts_per_task=4, images_per_prompt=2))
    assert measure.rows == prompts(4, seed=43, classes=world.SHAPES)
    report, outcomes = measure.report(), measure.outcomes()
    summary = summarise(outcomes, exhausted=["single_object"])
    value = report.values["geneval"]
    assert (value.value, [value.low, value.high]) == (summary["overall"], summary["interval"])
    assert value.n == len(measure.rows) == 24
    for task, part in summary["tasks"].items():
        assert report.values[f"geneval_{task}"].value == part["value"]
    assert report.values["geneval_correct_images"].value == pytest.approx(summary["correct_images"])
    assert report.values["geneval_correct_prompts"].value == pytest.approx(summary["correct_prompts"])
    assert [outcome["prompt"] for outcome in outcomes] == [row["prompt"] for row in measure.rows]
    assert [len(outcome["correct"]) for outcome in outcomes] == [2] * 24
    right = report.per_image["geneval_correct_images"]
    assert right == [float(x) for outcome in outcomes for x in outcome["correct"]]
    assert np.mean(report.per_image["geneval"]) == pytest.approx(value.value)
    assert report.settings["partial"] is False
    assert report.settings["title"] == "GenEval (shapes)"
    assert report.settings["detector"]["detector"] == "shapes"
    assert json.loads(json.dumps(report.settings)) == report.settings


def test_the_batch_and_the_order_change_no_verdict() -> None:
    one, other = GenEval(prompts_per_task=2, images_per_prompt=1), GenEval(prompts_per_task=2, images_per_prompt=1)
    images = torch.stack([drawn(row, 3) for row in one.rows])
    one.add(images, one.rows)
    for i in reversed(range(len(one.rows))):
        other.add(images[i : i + 1], [{"prompt": one.rows[i]["prompt"]}])
    assert one.outcomes() == other.outcomes()


def test_a_part_is_never_called_the_whole() -> None:
    measure = GenEval(prompts_per_task=4, images_per_prompt=2)
    report = filled(measure, measure.rows[:-1]).report()
    assert {name.split("_partial")[0] for name in report.values} == {"geneval"}
    assert "geneval" not in report.values
    assert "geneval_partial_colors" in report.values
    assert report.settings["partial"] is True
    assert (report.settings["prompts"], report.settings["prompts_expected"]) == (23, 24)
    assert (report.settings["images"], report.settings["images_expected"]) == (46, 48)
    last = measure.rows[-1]
    measure.add(drawn(last, 1)[None], [last])
    assert "geneval_partial" in measure.report().values, "the last prompt has one image of two"
    measure.add(drawn(last, 2)[None], [last])
    assert "geneval" in measure.report().values


def test_influences_have_the_summarys_mean_and_spread() -> None:
    rng = np.random.default_rng(0)
    tasks = ["a"] * 300 + ["b"] * 100 + ["c"] * 200
    values = [float(rng.random() < {"a": 0.2, "b": 0.5, "c": 0.9}[task]) for task in tasks]
    found = influences(values, tasks)
    groups = {t: [[v] for v, o in zip(values, tasks, strict=True) if o == t] for t in "abc"}
    estimate = cluster_bootstrap(groups)
    assert np.mean(found) == pytest.approx(estimate.value)
    assert 2 * 1.96 * np.std(found) / 600**0.5 == pytest.approx(estimate.high - estimate.low, rel=0.08)


def test_influences_of_one_task_have_its_mean_and_spread() -> None:
    rng = np.random.default_rng(1)
    tasks = ["a", "b", "b", "c", "c", "c"] * 100
    values = [float(rng.random() < {"a": 0.2, "b": 0.5, "c": 0.9}[task]) for task in tasks]
    found = influences(values, tasks, "b")
    own = [v for v, task in zip(values, tasks, strict=True) if task == "b"]
    assert np.mean(found) == pytest.approx(np.mean(own))
    assert np.std(found) / len(found) ** 0.5 == pytest.approx(np.std(own) / len(own) ** 0.5)
    assert {f for f, task in zip(found, tasks, strict=True) if task != "b"} == {found[0]}


def test_each_task_can_be_paired() -> None:
    report = filled(GenEval(prompts_per_task=4, images_per_prompt=2)).report()
    tasks = [name for name in report.values if name.removeprefix("geneval_") in TASKS]
    assert len(tasks) == 6
    for name in ("geneval", *tasks):
        assert np.mean(report.per_image[name]) == pytest.approx(report.values[name].value)


class TestRefused:
    def test_a_prompt_of_another_list(self) -> None:
        measure = GenEval(prompts_per_task=2)
        with pytest.raises(ValueError, match=r"prompt 'a photo of a cat' is none of this benchmark's 12"):
            measure.add(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), [{"prompt": "a photo of a cat"}])

    def test_the_same_words_for_another_thing(self) -> None:
        measure = GenEval(prompts_per_task=2)
        row = {**measure.rows[0], "include": [{"class": "circle", "count": 3}]}
        with pytest.raises(ValueError, match="asks for another thing than"):
            measure.match(row)

    def test_counting_without_its_limit(self) -> None:
        measure = GenEval(prompts_per_task=2, images_per_prompt=1)
        lost = [{k: v for k, v in row.items() if k != "exclude"} for row in measure.rows]
        with pytest.raises(ValueError, match="lacks its 'exclude', so four would pass for three"):
            filled(measure, lost)
        report = filled(GenEval(prompts_per_task=2, images_per_prompt=1, allow_missing_exclude=True), lost).report()
        assert next(iter(report.values)) == "geneval_no_exclude"
        assert report.settings["rows_without_exclude"] == 2

    def test_too_many_pass_without_a_limit(self) -> None:
        row = next(
            row
            for row in prompts(4, classes=world.SHAPES)
            if row["tag"] == "counting" and row["include"][0]["count"] == 2
        )
        label = row["include"][0]["class"]
        four = [world.Thing(label, "red", (x, y), 8 / 64) for x in (0.25, 0.75) for y in (0.25, 0.75)]
        picture = torch.from_numpy(world.render(pack([world.Scene("count", tuple(four))]), 64))
        verdicts = []
        for given in (row, {k: v for k, v in row.items() if k != "exclude"}):
            measure = GenEval(prompts_per_task=4, allow_missing_exclude=True)
            measure.add(picture, [given])
            verdicts.append(measure.verdicts.items[0][1])
        assert verdicts == [False, True]

    def test_no_images(self) -> None:
        with pytest.raises(ValueError, match="no outcomes"):
            GenEval(prompts_per_task=2).report()

    def test_no_images_per_prompt(self) -> None:
        with pytest.raises(ValueError, match="images_per_prompt is 0"):
            GenEval(images_per_prompt=0)

    def test_classes_that_the_detector_cannot_name(self) -> None:
        with pytest.raises(SpecError, match=r"80 classes that the detector shapes cannot name, such as 'airplane'"):
            GenEval(prompts="geneval.jsonl")

    def test_a_clip_that_is_not_needed(self) -> None:
        with pytest.raises(SpecError, match="names colours itself; expected no `clip`"):
            GenEval(clip="somewhere")

    def test_a_file_that_is_not_there(self) -> None:
        with pytest.raises(SpecError, match=r"did you mean 'geneval.jsonl'"):
            GenEval(prompts="geneval.json")


class TestCoco:
    def test_the_published_553_with_colors_by_clip(self, folders: tuple[str, str]) -> None:
        spec = {"name": "mask2former", "model": folders[0], "threshold": 0.001, "counting_threshold": 0.001}
        measure = GenEval(spec, clip=folders[1], images_per_prompt=1)
        assert len(measure.rows) == 553
        picked = [next(row for row in measure.rows if row["tag"] == task) for task in TASKS]
        picture = torch.randint(0, 256, (1, 3, 48, 64), dtype=torch.uint8)
        seen = measure.detector.detect(picture[0])
        assert seen
        colored = [row for row in measure.rows if row["tag"] == "colors"]
        label = next(o.label for o in seen if any(row["include"][0]["class"] == o.label for row in colored))
        picked += [row for row in colored if row["include"][0]["class"] == label]
        measure.add(picture.expand(len(picked), -1, -1, -1), picked)
        report = measure.report()
        assert report.settings["title"] == "GenEval (HF M2F)"
        assert report.settings["rows_sha256"].startswith("5c48e081")
        assert len(report.settings["colors"]["weights_sha256"]) == 64
        assert report.settings["prompts"] == len({row["prompt"] for row in picked})
        assert "geneval_partial" in report.values
        reasons = [r for outcome in measure.outcomes() if outcome["tag"] == "colors" for r in outcome["reasons"]]
        assert all("None" not in reason for reason in reasons), "a colour was asked for and not named"

    def test_colors_need_a_clip(self, folders: tuple[str, str]) -> None:
        with pytest.raises(SpecError, match="names no colours; give the folder of a CLIP as `clip`"):
            GenEval({"name": "mask2former", "model": folders[0]})


def test_options_are_plain(tmp_path: Path) -> None:
    assert specs.options("measure", GenEval)["detector"].default == "shapes"
