"""GenEval's folder layout: its images are scored like generated ones, and what is broken is named."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_folders
import tiny_world

from sana_lab.evaluation import Report
from sana_lab.evaluation.geneval.folder import read
from sana_lab.evaluation.geneval.measure import GenEval
from sana_lab.evaluation.image_files import Skipped
from sana_lab.evaluation.image_folder import measure_folder


def measure(**options: bool) -> GenEval:
    return GenEval(prompts_per_task=2, images_per_prompt=2, **options)


def score_folder(folder: Path, geneval: GenEval) -> Report:
    options = {"captions": None, "batch": 64}
    return measure_folder(folder, {"geneval": geneval}, options, Skipped(folder)).reports["geneval"]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Twelve prompts with two random pictures each, and things that are none of GenEval's."""
    for i, row in enumerate(measure().rows):
        tiny_folders.geneval(tmp_path / "out", i, row, tiny_world.images(5, [2 * i, 2 * i + 1]))
    (tmp_path / "out" / "notes.txt").write_text("x")
    (tmp_path / "out" / "grids").mkdir()
    (tmp_path / "out" / "00000" / "samples" / "grid.png").write_text("x")
    return tmp_path / "out"


def test_images_of_a_folder_score_like_generated_ones(images: Path) -> None:
    direct = measure()
    for i, row in enumerate(direct.rows):
        direct.add(tiny_world.images(5, [2 * i, 2 * i + 1]), [row, row])
    report = score_folder(images, measure())
    assert report == direct.report()
    assert sorted(p.name for p in images.glob("0*"))[:2] == ["00000", "00001"]
    assert json.loads((images / "00003" / "metadata.jsonl").read_text()) == direct.rows[3]
    assert [p.name for p in read(images)[0].images] == ["0000.png", "0001.png"]


def test_a_partial_folder_is_labelled(images: Path) -> None:
    shutil.rmtree(images / "00004")
    (images / "00005" / "samples" / "0001.png").unlink()
    report = score_folder(images, measure())
    assert "geneval_partial" in report.values
    assert (report.settings["prompts"], report.settings["images"]) == (11, 21)
    assert report.settings["images_per_prompt"] == [1, 2]


def test_a_folder_without_exclude_is_refused_or_labelled(images: Path) -> None:
    for path in images.glob("*/metadata.jsonl"):
        row = json.loads(path.read_text())
        row.pop("exclude", None)
        path.write_text(json.dumps(row))
    with pytest.raises(ValueError, match="a known bug of SANA's script"):
        score_folder(images, measure())
    report = score_folder(images, measure(allow_missing_exclude=True))
    assert "geneval_no_exclude" in report.values
    assert report.settings["rows_without_exclude"] == 2


def spoil(images: Path, how: str) -> None:
    inside = images / "00007"
    if how == "metadata missing":
        (inside / "metadata.jsonl").unlink()
    elif how == "metadata cut":
        (inside / "metadata.jsonl").write_text('{"tag": "col')
    elif how == "no tag":
        (inside / "metadata.jsonl").write_text('{"prompt": "a cat"}')
    elif how == "no samples":
        shutil.rmtree(inside / "samples")
    elif how == "empty image":
        (inside / "samples" / "0001.png").write_bytes(b"")
    elif how == "cut image":
        path = inside / "samples" / "0001.png"
        path.write_bytes(path.read_bytes()[:-400])
    elif how == "other prompts":
        row = json.loads((inside / "metadata.jsonl").read_text())
        (inside / "metadata.jsonl").write_text(json.dumps({**row, "prompt": "a photo of a cat"}))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("metadata missing", r"00007/metadata.jsonl is not one line of JSON"),
        ("metadata cut", r"00007/metadata.jsonl is not one line of JSON"),
        ("no tag", r"00007/metadata.jsonl: expected a row with a 'tag'"),
        ("no samples", r"00007/samples holds no images called 0000.png"),
        ("empty image", r"00007/samples/0001.png is broken: not an image"),
        ("other prompts", r"prompt 'a photo of a cat' is none of this benchmark's 12"),
    ],
)
def test_what_is_broken_is_named(images: Path, how: str, message: str) -> None:
    spoil(images, how)
    with pytest.raises(ValueError, match=message):
        score_folder(images, measure())


def test_a_few_unreadable_images_are_skipped(images: Path) -> None:
    spoil(images, "cut image")
    skipped = Skipped(images)
    report = measure_folder(images, {"geneval": measure()}, {"captions": None, "batch": 64}, skipped).reports["geneval"]
    assert [Path(name).name for name in skipped.reasons] == ["0001.png"]
    assert "geneval_partial" in report.values
    assert report.settings["images"] == 23


def test_a_folder_that_is_none(images: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no folder '.*aut'; did you mean 'out'"):
        read(images.with_name("aut"))
    with pytest.raises(ValueError, match=r"has no numbered folders \(00000"):
        read(images / "grids")
