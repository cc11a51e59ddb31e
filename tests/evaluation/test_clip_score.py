"""CLIP score: SANA's number, what becomes of long prompts, and what a wrong folder is told."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_folders
import torch
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from sana_lab.config import specs
from sana_lab.config.specs import SpecError
from sana_lab.evaluation.clip_score import ClipScore, split

PROMPTS = ["a red circle", "two blue squares on the left of a green triangle", "a photo of a dog"]
LONG = "A red circle. " * 20 + "A blue dog."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_folders.clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(0, 256, (6, 3, 48, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def rows(prompts: list[str]) -> list[dict]:
    return [{"prompt": prompt} for prompt in prompts]


def by_hand(folder: str, image: Tensor, ids: list[int]) -> float:
    """100 x the cosine with transformers alone, one picture and one text at a time, nothing padded."""
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPImageProcessor.from_pretrained(folder)
    pixels = processor(image.permute(1, 2, 0).numpy(), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        a = model.get_image_features(pixels).pooler_output[0]
        b = model.get_text_features(torch.tensor([ids])).pooler_output[0]
    return 100 * float(torch.cosine_similarity(a, b, 0))


def test_it_is_100_times_the_mean_cosine(folder: str, images: Tensor) -> None:
    measure = ClipScore(folder, batch=2)
    prompts = [*PROMPTS, *PROMPTS]
    measure.add(images[:4], rows(prompts[:4]))
    measure.add(images[4:], rows(prompts[4:]))
    report = measure.report()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = [by_hand(folder, i, tokenizer(p)["input_ids"]) for i, p in zip(images, prompts, strict=True)]
    assert report.per_image["clip"] == pytest.approx(expected, abs=1e-3)
    assert report.values["clip"].value == pytest.approx(np.mean(expected), abs=1e-3)
    assert min(expected) < 0, "a clamp would show"
    assert report.values["clip"].low < report.values["clip"].value < report.values["clip"].high
    assert report.values["clip"].n == 3
    assert report.values["clip_truncated"].value == 0
    assert json.loads(json.dumps(report.settings)) == report.settings
    assert report.settings["dtype"] == "float32"
    assert len(report.settings["weights_sha256"]) == 64


def test_the_batch_changes_nothing(folder: str, images: Tensor) -> None:
    found = []
    for batch in (1, 4):
        measure = ClipScore(folder, batch=batch)
        measure.add(images, rows([*PROMPTS, LONG, *PROMPTS[:2]]))
        found.append(measure.report().per_image["clip"])
    assert found[0] == pytest.approx(found[1], abs=1e-4)


def test_a_cut_prompt_keeps_its_end(folder: str, images: Tensor) -> None:
    measure = ClipScore(folder)
    measure.add(images[:2], rows([LONG, PROMPTS[0]]))
    report = measure.report()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    whole = tokenizer(LONG, verbose=False)["input_ids"]
    assert len(whole) > 77
    expected = by_hand(folder, images[0], [*whole[:76], tokenizer.eos_token_id])
    assert report.per_image["clip"][0] == pytest.approx(expected, abs=1e-3)
    assert report.values["clip_truncated"].value == 50
    assert report.settings["truncated_percent"] == 50


def test_chunks_have_their_own_name_and_read_all(folder: str, images: Tensor) -> None:
    measure = ClipScore(folder, long="chunks")
    measure.add(images[:2], rows([LONG, PROMPTS[0]]))
    report = measure.report()
    assert report.values.keys() == report.per_image.keys() == {"clip_chunks"}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pieces = split(LONG, lambda text: len(tokenizer(text)["input_ids"]) <= 77)
    assert " ".join(pieces) == LONG
    assert len(pieces) == 2
    expected = np.mean([by_hand(folder, images[0], tokenizer(piece)["input_ids"]) for piece in pieces])
    assert report.per_image["clip_chunks"][0] == pytest.approx(expected, abs=1e-3)
    plain = ClipScore(folder)
    plain.add(images[1:2], rows(PROMPTS[:1]))
    assert plain.report().per_image["clip"][0] == pytest.approx(report.per_image["clip_chunks"][1], abs=1e-4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one two. three.", ["one two. three."]),
        ("one two three. four five! six", ["one two three.", "four five! six"]),
        ("a b c d e f. g", ["a b c d", "e f. g"]),
        ("one", ["one"]),
        ("", [""]),
    ],
)
def test_chunks_break_between_sentences_or_words(text: str, expected: list[str]) -> None:
    assert split(text, lambda piece: len(piece.split()) <= 4) == expected


def test_images_of_one_prompt_are_one_cluster(folder: str, images: Tensor) -> None:
    measure = ClipScore(folder)
    measure.add(images, rows([PROMPTS[0]] * 6))
    value = measure.report().values["clip"]
    assert (value.low, value.high, value.n) == (None, None, 1)


def test_nothing_has_no_score(folder: str) -> None:
    with pytest.raises(ValueError, match="no images came"):
        ClipScore(folder).report()


def test_a_wrong_folder_is_told(folder: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"there is no folder '.*clop' with a clip model"):
        ClipScore(str(tmp_path / "clop"))
    other = tiny_folders.blip(tmp_path / "blip")
    with pytest.raises(SpecError, match="holds a blip model, expected a clip"):
        ClipScore(other)
    bare = Path(tiny_folders.clip(tmp_path / "bare"))
    (bare / "preprocessor_config.json").unlink()
    with pytest.raises(SpecError, match=r"lacks a preprocessor_config.json"):
        ClipScore(str(bare))


def test_its_options_are_plain() -> None:
    assert list(specs.options("measure", ClipScore)) == ["model", "batch", "long", "device"]
