"""GenEval's prompts: the published ones to the byte, other vocabularies, files, and rows that cannot be scored."""

import hashlib
import json
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from sana_lab.config.schema import EvaluationOptions
from sana_lab.config.specs import SpecError
from sana_lab.evaluation.geneval import prompts as geneval
from sana_lab.evaluation.geneval.prompts import check_rows, coco_classes, find_prompts, read_rows
from sana_lab.evaluation.geneval.vocabulary import NUMBERS, TASKS, article, plural
from sana_lab.shapes.scenes import SHAPES
from sana_lab.types import Json

EVAL = Path(__file__).parents[3] / "eval"
PUBLISHED = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"

prompts = partial(geneval.prompts, classes=SHAPES)


def lines(rows: list[Json]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_rows_of_small_tasks_are_repeated_to_as_many_images() -> None:
    sparse = geneval.generated(lambda n: prompts(n, seed=43), 50)
    assert sparse.repeated == list(sparse.rows) == prompts(50, seed=43)
    assert sparse.exhausted == {"single_object", "two_object", "counting", "colors", "position"}
    assert "position" not in geneval.generated(lambda n: prompts(n, seed=43), 44).exhausted
    full = geneval.generated(lambda n: prompts(n, seed=43), 50, fill=True)
    assert full.rows == sparse.rows
    counts = Counter(row["tag"] for row in full.repeated)
    assert counts == {
        "single_object": 52, "two_object": 60, "counting": 60, "colors": 80, "position": 96, "color_attr": 50
    }  # fmt: skip
    assert set(Counter(row["prompt"] for row in full.repeated if row["tag"] == "single_object").values()) == {13}


def test_geneval_itself_comes_out_to_the_byte() -> None:
    classes = (EVAL / "prompts" / "geneval_classes.txt").read_text().splitlines()
    rows = geneval.prompts(100, 43, classes=classes, colorless=True, top_up=False)
    assert (EVAL / "prompts" / "geneval.jsonl").read_bytes() == lines(rows).encode()
    assert classes == coco_classes()
    assert hashlib.sha256(lines(rows).encode()).hexdigest() == PUBLISHED
    tags = Counter(row["tag"] for row in rows)
    assert [tags[task] for task in TASKS] == [80, 99, 80, 94, 100, 100]


@pytest.mark.parametrize(("n", "expected"), [(12, [4, 12, 12, 12, 12, 12]), (60, [4, 12, 12, 40, 48, 60])])
def test_shapes_are_topped_up_to_what_exists(n: int, expected: list[int]) -> None:
    rows = prompts(n)
    tags = Counter(row["tag"] for row in rows)
    assert [tags[task] for task in TASKS] == expected
    assert len({json.dumps(row) for row in rows}) == len({row["prompt"] for row in rows}) == len(rows)
    assert rows == prompts(n)
    assert rows != prompts(n, seed=44)
    check_rows(rows)


def test_as_drawn_there_are_fewer() -> None:
    assert 4 + 12 <= len(prompts(12, top_up=False)) < len(prompts(12))


def test_articles_and_plurals() -> None:
    assert [article(x) for x in ("orange square", "red circle")] == ["an orange square", "a red circle"]
    assert [plural(x) for x in ("cross", "circle")] == ["crosses", "circles"]


def test_rows_say_what_their_prompts_say() -> None:
    for row in prompts(60):
        words = row["prompt"].removeprefix("a photo of ").split()
        for need in row["include"]:
            noun = need["class"] if need["count"] == 1 else plural(need["class"])
            assert noun in words
            assert need["count"] == 1 or words[0] == NUMBERS[need["count"]]
            assert "color" not in need or words[words.index(noun) - 1] == need["color"]
        if row["tag"] == "position":
            target, subject = row["include"]
            where, index = subject["position"]
            assert index == 0
            assert row["prompt"] == f"a photo of a {subject['class']} {where} a {target['class']}"
        assert ("exclude" in row) == (row["tag"] == "counting")


@pytest.mark.parametrize("given", [{"n_per_task": 0}, {"n_per_task": 5, "classes": ["circle"]}])
def test_too_few_to_draw_from(given: Json) -> None:
    with pytest.raises(ValueError, match="two classes and two colours; given"):
        prompts(**given)


def test_rows_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(lines(prompts(5)))
    assert read_rows(path) == prompts(5)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_rows_from_a_file_of_another_program(tmp_path: Path, encoding: str) -> None:
    rows = [{**row, "prompt": row["prompt"] + "\u2028"} for row in prompts(5)]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "rows.jsonl").write_bytes(text.encode(encoding))
    assert read_rows(tmp_path / "rows.jsonl") == rows


def test_half_of_a_surrogate_pair_is_no_prompt(tmp_path: Path) -> None:
    rows = [{**row, "prompt": "a \ud83d"} for row in prompts(1)]
    (tmp_path / "rows.jsonl").write_text(lines(rows))
    with pytest.raises(ValueError, match=r"prompt 0: .*half of a surrogate pair"):
        read_rows(tmp_path / "rows.jsonl")


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(lines(prompts(1))[:200] + "\n{oops\n")
    with pytest.raises(ValueError, match=r"rows.jsonl, line \d is no JSON"):
        read_rows(path)


def test_prompts_are_found_by_name() -> None:
    assert len(read_rows(find_prompts("geneval.jsonl"))) == 553
    with pytest.raises(SpecError, match=r"no file of prompts 'genevel.jsonl'; did you mean 'geneval.jsonl'"):
        find_prompts("genevel.jsonl")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the list of prompts is empty"),
        ([{"tag": "colors", "include": [{"class": "circle", "count": 1}], "prompt": 3}], "'prompt' that is text"),
        ([{"tag": "colors", "include": [{"class": "circle", "count": 1}], "prompt": " "}], "'prompt' that is text"),
        (["a photo of a circle"], "'prompt' that is text"),
        ([{"tag": "colors", "include": [], "prompt": "a circle"}], "'include' list"),
        ([{"tag": "counting", "include": [{"class": "circle", "count": 2}], "prompt": "two"}], "needs its 'exclude'"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(rows: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_rows(rows)


@pytest.mark.parametrize("path", sorted(EVAL.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_suite_that_ships_is_one(path: Path) -> None:
    OmegaConf.merge(OmegaConf.structured(EvaluationOptions), OmegaConf.load(path))
