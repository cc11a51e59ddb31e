"""Two evaluations side by side: paired where they can be, refused where not, with the reason."""

import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from sana_lab import __main__
from sana_lab.config.specs import SpecError
from sana_lab.evaluation import compare


def evaluation(values: list[float], drawn: str = "a", weights: str = "x") -> dict:
    mean = {"value": float(np.mean(values)), "low": None, "high": None, "n": len(values)}
    settings = {"model": {"weights_sha256": weights}, "features_mib": len(values)}
    return {
        "measures": {"clip_score": {"values": {"clip": mean}, "settings": settings}},
        "per_image": {"clip": {"values": values, "drawn": drawn, "images_per_prompt": 1}},
    }


RANDOM = np.random.default_rng(0)
SHARED = RANDOM.normal(25, 5, 60)
A, B = evaluation(SHARED.tolist()), evaluation((SHARED + RANDOM.normal(0.3, 0.1, 60)).tolist())


@pytest.fixture
def files(here: Path) -> list[str]:
    for name, found in (("a", A), ("b", B)):
        Path(f"{name}.json").write_text(json.dumps(found))
    return ["a.json", "b.json"]


def test_the_difference_is_paired(files, capsys):
    line = compare.compare(A, B)[0]
    expected = stats.ttest_rel(B["per_image"]["clip"]["values"], A["per_image"]["clip"]["values"]).confidence_interval()
    assert (line.difference.low, line.difference.high) == pytest.approx((expected.low, expected.high))
    assert __main__.main(["compare", *files]) == 0
    said = capsys.readouterr().out
    assert "▲" in said
    assert "paired t test over prompts" in said


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (evaluation(SHARED.tolist(), weights="y"), 'model.weights_sha256 is "x" and "y"'),
        (evaluation(SHARED.tolist(), drawn="b"), "other prompts, noise or numbers of images"),
        (evaluation(SHARED[:50].tolist()), "other prompts, noise or numbers of images"),
    ],
)
def test_what_is_not_comparable_is_refused_with_the_reason(here, capsys, other, words):
    Path("a.json").write_text(json.dumps(A))
    Path("b.json").write_text(json.dumps(other))
    assert __main__.main(["compare", "a.json", "b.json"]) == 1
    assert f"not compared: {words}" in capsys.readouterr().out


def test_a_column_without_numbers_per_image_says_so():
    bare = deepcopy(A)
    bare["per_image"] = {}
    assert compare.compare(A, bare)[0].reason == "it has no numbers per image"


def test_wrong_files(files):
    with pytest.raises(SpecError, match=r"no file 'c.json'; did you mean"):
        compare.read(Path("c.json"))
    Path("d.json").write_text("[1]")
    with pytest.raises(SpecError, match="holds no evaluation"):
        compare.read(Path("d.json"))
    with pytest.raises(SpecError, match="share no measure"):
        compare.compare(A, {**B, "measures": {"geneval": {}}})


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_report_in_another_encoding(files, encoding):
    Path("wide.json").write_bytes(json.dumps(A).encode(encoding))
    assert compare.read(Path("wide.json")) == A


ODD = {
    "nothing": "",
    "list": "[1]",
    "deep": "[" * 100_000,
    "no measures": '{"per_image": {}}',
    "measures of a list": '{"measures": [1], "per_image": {}}',
    "a measure of a number": '{"measures": {"a": 1}, "per_image": {}}',
    "numbers as text": '{"measures": {"a": {"values": {"x": {"value": "much"}}, "settings": {}}}, "per_image": {}}',
    "NaN": '{"measures": {"a": {"values": {"x": {"value": NaN}}, "settings": {}}}, "per_image": {}}',
    "deep settings": json.dumps(A)[:-1].replace('"features_mib": 60', '"b": ' + '{"c": ' * 200 + "1" + "}" * 200) + "}",
    "NaN per image": json.dumps(A).replace('"values": [', '"values": [NaN, '),
    "no images per prompt": json.dumps(A).replace('"images_per_prompt": 1', '"images_per_prompt": 0'),
}


@pytest.mark.parametrize("content", ODD.values(), ids=ODD.keys())
def test_odd_files_are_one_line(files, capsys, content):
    Path("odd.json").write_text(content)
    for names in (["odd.json", "a.json"], ["a.json", "odd.json"]):
        assert __main__.main(["compare", *names]) == 1
        error = capsys.readouterr().err
        assert error.startswith("sana-lab: odd.json")
        assert error.count("\n") == 1


def test_rows_come_in_the_order_of_the_first(capsys):
    names = ["zeta", "fid", "alpha", "clip", "kid", "beta"]
    values = {name: {"value": 1.0, "low": None, "high": None, "n": 1} for name in names}
    measures = {"z": {"values": values, "settings": {}}, "a": {"values": {"last": values["fid"]}, "settings": {}}}
    lines = compare.compare({"measures": measures, "per_image": {}}, {"measures": measures, "per_image": {}})
    assert [line.name for line in lines] == [*names, "last"]
    shown = [line.split()[0] for line in compare.lines(lines)[1:]]
    assert shown == ["Zeta", "FID", "Alpha", "CLIP", "KID", "Beta", "Last"]


def test_the_tasks_that_were_compared_are_listed():
    tasks = {name: {"prompts": 2, "images": 4} for name in ("colors", "counting", "position")}
    a, b = {"geneval": {"tasks": tasks}}, {"geneval": {"tasks": {k: tasks[k] for k in ("colors", "counting")}}}
    assert compare.task_lines(a, a) == ["Tasks of GenEval: colors, counting, position (6 prompts, 12 images)."]
    shared, only = compare.task_lines(a, b)
    assert shared == "Tasks of GenEval: colors, counting (4 prompts, 8 images)."
    assert only == "Only the first has position; the means over tasks are of other tasks."
    assert compare.task_lines(a, {}) == []
