"""DPG-Bench: what depends on what, its score by hand, grids cut, a BLIP that answers, and files that are wrong."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny_folders
import torch
from PIL import Image
from torch import Tensor
from transformers import BlipForQuestionAnswering, BlipImageProcessor

from sana_lab.config.specs import SpecError
from sana_lab.evaluation.dpg import Dpg, by_prompt, holds, read_items, score_folder, split_grid
from sana_lab.evaluation.vqa import Vqa
from sana_lab.evaluation.vqa.blip import Blip
from sana_lab.types import Json

HEADER = [
    *("item_id", "text", "keywords", "proposition_id", "dependency", "category_broad", "category_detailed"),
    *("tuple", "question_natural_language"),
]
DOG = "A brown dog, which wears a red hat, sits by a door."
LINES = [
    ("dog", DOG, "", "1", "0", "entity", "whole", "entity - whole (dog)", "Is there a dog?"),
    ("dog", DOG, "", "2", "1", "attribute", "color", "attribute - color (dog, brown)", "Is the dog brown?"),
    ("dog", DOG, "", "3", "1", "entity", "part", "entity - part (hat)", "Does the dog wear a hat?"),
    ("dog", DOG, "", "4", "3", "attribute", "color", "attribute - color (hat, red)", "Is the hat red?"),
    ("sea", "The sea.", "", "1", "0", "entity", "whole", "entity - whole (sea)", "Is there a sea?"),
]


class Scripted(Vqa):
    """Answers no to the questions in the script of the picture, which is the value of its first pixel."""

    def __init__(self, script: str = "{}") -> None:
        self.script = {int(k): v for k, v in json.loads(script).items()}

    def answer(self, image: Tensor, questions: Sequence[str]) -> list[bool]:
        return [
            not any(word in question for word in self.script.get(int(image[0, 0, 0]), [])) for question in questions
        ]

    def identity(self) -> Json:
        return {"vqa": "scripted"}


def written(path: Path, lines: Sequence[Sequence[str]], header: Sequence[str] = HEADER) -> str:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *lines])
    return str(path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_questions_in_a_file_of_another_program(tmp_path: Path, encoding: str, delimiter: str) -> None:
    with (tmp_path / "dpg.csv").open("w", encoding=encoding, newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([[name.title() for name in HEADER], *LINES])
    assert read_items(tmp_path / "dpg.csv") == read_items(written(tmp_path / "plain.csv", LINES))


def test_an_unclosed_quote_is_named_by_line(tmp_path: Path) -> None:
    text = Path(written(tmp_path / "dpg.csv", LINES)).read_text()
    (tmp_path / "dpg.csv").write_text(text.replace("Is the dog brown?", '"Is the dog brown?'))
    with pytest.raises(ValueError, match=r"dpg.csv:3: .*not closed"):
        read_items(tmp_path / "dpg.csv")
    lines = [*LINES[:1], (*LINES[1][:-1], f"Is the dog brown?\ndog,{DOG},,3"), *LINES[3:]]
    with pytest.raises(ValueError, match=r"line 3: a field in quotes holds the row of 'dog'"):
        read_items(written(tmp_path / "dpg.csv", lines))


@pytest.fixture
def table(tmp_path: Path) -> str:
    return written(tmp_path / "dpg_bench.csv", LINES)


def measured(table: str, script: dict[int, list[str]], **options: int) -> Dpg:
    return Dpg(table, {"name": f"{__name__}:Scripted", "script": json.dumps(script)}, **options)


def pictures(*values: int) -> Tensor:
    return torch.stack([torch.full((3, 4, 4), value, dtype=torch.uint8) for value in values])


# --- the file -------------------------------------------------------------------------------------------------------


def test_the_first_question_is_read_too(table: str) -> None:
    dog, sea = read_items(table)
    assert (dog.item_id, dog.prompt, sea.prompt) == ("dog", DOG, "The sea.")
    assert [q.text for q in dog.questions.values()] == [line[-1] for line in LINES[:4]]
    assert {p: q.parents for p, q in dog.questions.items()} == {1: (), 2: (1,), 3: (1,), 4: (3,)}
    assert dog.questions[4][2:] == ("attribute", "color")


def test_a_header_that_stands_twice_is_no_question(tmp_path: Path, table: str) -> None:
    assert read_items(written(tmp_path / "twice.csv", [HEADER, *LINES])) == read_items(table)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({3: "one"}, r"line 2: expected whole numbers as proposition_id and dependency"),
        ({4: "x, 1"}, r"line 2: expected whole numbers"),
        ({3: "2"}, r"line 3: proposition 2 of 'dog' is there twice"),
        ({4: "9"}, r"dog: proposition 1 depends on 9, which it does not have"),
        ({4: "4"}, r"dog: its propositions depend on each other in a ring"),
        ({8: " "}, r"line 2: there is no question"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, change: dict[int, str], message: str) -> None:
    first = [change.get(i, value) for i, value in enumerate(LINES[0])]
    with pytest.raises(ValueError, match=message):
        read_items(written(tmp_path / "wrong.csv", [first, *LINES[1:]]))


def test_a_file_of_something_else(tmp_path: Path) -> None:
    names = [{"dependency": "dependencies"}.get(name, name) for name in HEADER]
    other = written(tmp_path / "other.csv", LINES, names)
    with pytest.raises(ValueError, match=r"has no column 'dependency'; did you mean 'dependencies'"):
        read_items(other)
    with pytest.raises(ValueError, match="holds no questions"):
        read_items(written(tmp_path / "empty.csv", []))


# --- the score ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("no", "expected"),
    [
        ([], [1, 1, 1, 1]),
        ([1], [0, 0, 0, 0]),  # the dog is missing: neither it nor its hat nor the hat's red
        ([3], [1, 1, 0, 0]),
        ([2], [1, 0, 1, 1]),
        ([4, 2], [1, 0, 1, 0]),
    ],
)
def test_a_failed_parent_fails_its_children(table: str, no: list[int], expected: list[int]) -> None:
    dog = read_items(table)[0]
    held = holds(dog, {p: p not in no for p in dog.questions})
    assert [int(held[p]) for p in (1, 2, 3, 4)] == expected


def test_children_may_stand_before_their_parents(tmp_path: Path) -> None:
    dog = read_items(written(tmp_path / "back.csv", LINES[3::-1]))[0]
    assert not any(holds(dog, {p: p != 1 for p in dog.questions}).values())


def test_the_score_by_hand(table: str) -> None:
    """Three pictures: the hat is missing (2 of 4), all there (4 of 4), and no sea (0 of 1)."""
    measure = measured(table, {1: ["hat?"], 3: ["sea"]}, images_per_prompt=2)
    dog, sea = measure.rows
    measure.add(pictures(1, 2), [dog, dog])
    measure.add(pictures(3, 2), [sea, sea])
    report = measure.report()
    assert report.values["dpg"].value == pytest.approx((75 + 50) / 2)
    assert report.values["dpg"].n == 2
    assert report.per_image["dpg"] == pytest.approx([50, 100, 0, 100])
    assert report.values["dpg_entity"].value == pytest.approx(100 * (1 + 2 + 0 + 1) / 6)
    assert report.values["dpg_attribute"].value == pytest.approx(100 * (1 + 2) / 4)
    assert report.values.keys() == {"dpg", "dpg_entity", "dpg_attribute"}
    detailed = {name: value.value for name, value in measure.categories(detailed=True).items()}
    assert detailed == pytest.approx({"attribute - color": 75, "entity - part": 50, "entity - whole": 75})
    assert [outcome["scores"] for outcome in measure.outcomes()] == [[50, 100], [0, 100]]
    assert report.settings["partial"] is False
    assert json.loads(json.dumps(report.settings)) == report.settings


def test_categories_respect_dependence_and_all_pictures(table: str) -> None:
    """The original takes the last picture alone, and the hat's red as right without a hat."""
    measure = measured(table, {1: ["hat?"]}, images_per_prompt=2)
    measure.add(pictures(1, 2), [measure.rows[0]] * 2)
    assert measure.report().values["dpg_partial_attribute"].value == 75


def test_a_part_is_called_so(table: str) -> None:
    measure = measured(table, {}, images_per_prompt=1)
    with pytest.raises(ValueError, match="no images came"):
        measure.report()
    measure.add(pictures(0), measure.rows[:1])
    report = measure.report()
    assert next(iter(report.values)) == "dpg_partial"
    assert (report.settings["prompts"], report.settings["prompts_expected"]) == (1, 2)
    with pytest.raises(ValueError, match=r"item_id 'cat' is none of this benchmark's 2"):
        measure.add(pictures(0), [{"prompt": "A cat.", "item_id": "cat"}])


def test_prompts_weigh_the_same_whatever_their_images() -> None:
    found = by_prompt([0, 100, 100, 50], [7, 7, 7, 3])
    assert np.mean(found) == pytest.approx((200 / 3 + 50) / 2)
    assert by_prompt([0, 100, 20, 50], [0, 0, 1, 1]) == pytest.approx([0, 100, 20, 50])


# --- folders --------------------------------------------------------------------------------------------------------


def test_a_grid_is_cut_row_by_row() -> None:
    image = torch.arange(24, dtype=torch.uint8).reshape(1, 4, 6).expand(3, -1, -1)
    assert [int(part[0, 0, 0]) for part in split_grid(image, 2)] == [0, 2, 4, 12, 14, 16]
    with pytest.raises(ValueError, match="6 x 4 pixels is no grid of squares of 4"):
        split_grid(image, 4)


def test_folders_of_grids_and_of_single_pictures(table: str, tmp_path: Path) -> None:
    home = tmp_path / "images"
    home.mkdir()
    for name, values in {"dog": [1, 2, 2, 2], "sea": [3, 2, 3, 2]}.items():
        grid = np.array(values, np.uint8).reshape(2, 2).repeat(8, 0).repeat(8, 1)
        Image.fromarray(grid).convert("RGB").save(home / f"{name}.png")
    report = score_folder(home, measured(table, {1: ["hat?"], 3: ["sea"]}), side=8)
    assert report.values["dpg"].value == pytest.approx(((50 + 300) / 4 + 50) / 2)
    single = score_folder(home, measured(table, {1: ["hat?"]}, images_per_prompt=1))
    assert single.per_image["dpg"] == [50, 100]
    with pytest.raises(ValueError, match=r"dog.png is a grid of 16 images, expected 4"):
        score_folder(home, measured(table, {}), side=4)
    (home / "cat.png").write_bytes((home / "sea.png").read_bytes())
    with pytest.raises(ValueError, match=r"holds 'cat.png', which belongs to no item; 1 such in 3"):
        score_folder(home, measured(table, {}), side=8)
    (home / "cat.png").unlink()
    (home / "sea.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"sea.png: not an image"):
        score_folder(home, measured(table, {}), side=8)
    with pytest.raises(ValueError, match=r"holds no images called after the items, such as dog.png"):
        score_folder(tmp_path, measured(table, {}), side=8)


# --- BLIP -----------------------------------------------------------------------------------------------------------

QUESTIONS = [
    "is there a dog",
    "is the circle red",
    "is the square left of a blue circle",
    "what color is the dog",
    "no",
]


def test_blip_answers_as_transformers_likes_yes_or_no(tmp_path: Path) -> None:
    """One question at a time, the first word's logits of transformers' own forward pass."""
    folder = tiny_folders.blip(tmp_path)
    network = BlipForQuestionAnswering.from_pretrained(folder).eval()
    processor, tokenizer = BlipImageProcessor.from_pretrained(folder), tiny_folders.word_tokenizer()
    yes, no = (tiny_folders.WORDS.index(word) for word in ("yes", "no"))
    ours, answers = Blip(folder, batch=2), []
    for seed in range(8):
        rgb = torch.tensor([seed & 1, seed >> 1 & 1, seed >> 2], dtype=torch.uint8)
        image = (255 * rgb)[:, None, None].expand(3, 40, 60)
        pixels = processor(image.permute(1, 2, 0).numpy(), return_tensors="pt")["pixel_values"]
        expected = []
        for question in QUESTIONS:
            ids = torch.tensor([tokenizer(question)["input_ids"]])
            with torch.no_grad():
                seen = network.vision_model(pixels).last_hidden_state
                read = network.text_encoder(ids, encoder_hidden_states=seen).last_hidden_state
                logits = network.text_decoder(torch.tensor([[2]]), encoder_hidden_states=read).logits[0, -1]
            expected.append(bool(logits[yes] > logits[no]))
        assert ours.answer(image, QUESTIONS) == expected
        answers.append(expected)
    assert len({tuple(given) for given in answers}) > 1, "the picture changes no answer, so the test says little"
    assert len({tuple(given) for given in zip(*answers, strict=True)}) > 1, "nor does the question"
    assert json.loads(json.dumps(ours.identity())) == ours.identity()


def test_blip_as_the_measures_part(table: str, tmp_path: Path) -> None:
    folder = tiny_folders.blip(tmp_path / "blip")
    measure = Dpg(table, {"name": "blip", "model": folder}, images_per_prompt=1)
    measure.add(pictures(0, 9), measure.rows)
    assert 0 <= measure.report().values["dpg"].value <= 100
    assert measure.report().settings["vqa"]["vqa"] == "blip"


def test_a_blip_without_the_words(tmp_path: Path) -> None:
    folder = tiny_folders.blip(tmp_path)
    tiny_folders.word_tokenizer([word for word in tiny_folders.WORDS if word != "yes"]).save_pretrained(folder)
    with pytest.raises(SpecError, match="has no word 'yes'"):
        Blip(folder)
    with pytest.raises(SpecError, match="batch is 0"):
        Blip(folder, batch=0)
