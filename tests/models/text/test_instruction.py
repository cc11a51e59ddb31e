"""Instructions, and prompts as diffusers' SanaPipeline encodes them with and without one."""

import ast
import inspect
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import tiny_peers
import torch
from tokenizers import normalizers
from transformers import Gemma2Model

from sana_lab.config.specs import SpecError
from sana_lab.models.text.instruction import SANA_LAB, read_instruction
from sana_lab.models.text.llm import Llm

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers on numpy 2
PROMPTS = [" A Red Circle", "a photo of a BLUE square left of two green triangles ", "stars"]
NEGATIVES = ["", "Fog, in the distance", "red"]


@pytest.fixture(scope="module")
def released() -> list[str]:
    """The lines that the released weights were trained with, as the pipeline's source has them."""
    from diffusers import SanaPipeline

    source = ast.parse(textwrap.dedent(inspect.getsource(SanaPipeline.__call__)))
    [written] = [
        default
        for node in ast.walk(source)
        if isinstance(node, ast.FunctionDef) and node.name == "__call__"
        for name, default in zip(node.args.args[-len(node.args.defaults) :], node.args.defaults, strict=True)
        if name.arg == "complex_human_instruction"
    ]
    return ast.literal_eval(written)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A SanaPipeline whose tokenizer knows capitals, and the folder of its text parts."""
    reference, folder = tiny_peers.sana_pipeline(), tmp_path_factory.mktemp("sana")
    reference.tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    reference.tokenizer.save_pretrained(folder / "tokenizer")
    reference.text_encoder.save_pretrained(folder / "text_encoder")
    return reference, folder


@pytest.mark.parametrize("name", [None, "released", "sana_lab"])
@pytest.mark.parametrize("pad_to_max", [True, False])
def test_prompts_are_encoded_as_diffusers_does(
    pipeline: tuple[Any, Path], released: list[str], name: str | None, pad_to_max: bool
) -> None:
    reference, folder = pipeline
    lines = {None: None, "released": released, "sana_lab": SANA_LAB.split("\n")}[name]
    encoder = Llm(str(folder), instruction=name, lowercase=True, pad_to_max=pad_to_max)
    with torch.no_grad():
        text = encoder(PROMPTS)
        null = encoder.negative(NEGATIVES, text)
        theirs = reference.encode_prompt(
            PROMPTS, negative_prompt=NEGATIVES, complex_human_instruction=lines, device="cpu"
        )
    for ours, tokens, mask in ((text, *theirs[:2]), (null, *theirs[2:])):
        length, mask = ours.mask.shape[1], mask.bool()
        assert length == 300 if pad_to_max else length < 60
        assert torch.equal(ours.mask, mask[:, :length])
        assert not mask[:, length:].any()
        torch.testing.assert_close(ours.tokens[ours.mask], tokens[mask], rtol=1e-5, atol=1e-5)


def test_capitals_count_unless_they_are_taken_away(pipeline: tuple[Any, Path]) -> None:
    folder = str(pipeline[1])
    with torch.no_grad():
        (as_given, small), lowered = (Llm(folder)([p]).tokens for p in ("A Red", "a red")), Llm(folder, lowercase=True)
        assert as_given.shape != small.shape
        assert torch.equal(lowered([" A Red "]).tokens, small)


def test_in_half_precision_too(
    pipeline: tuple[Any, Path], released: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dtype in which the released text encoder is used; loaded so: `.to` would round its rotary frequencies too."""
    reference, folder = pipeline
    half = Gemma2Model.from_pretrained(folder / "text_encoder", dtype=torch.bfloat16)
    monkeypatch.setattr(reference, "text_encoder", half)
    encoder = Llm(str(folder), instruction="released", dtype="bfloat16", lowercase=True, pad_to_max=True)
    with torch.no_grad():
        tokens, *_ = reference.encode_prompt(PROMPTS, False, complex_human_instruction=released, device="cpu")
        text = encoder(PROMPTS)
    assert text.tokens.dtype == torch.bfloat16
    assert torch.equal(text.tokens[text.mask], tokens[text.mask])


# --- the texts


def test_the_released_text_is_read_from_diffusers(released: list[str]) -> None:
    assert read_instruction("released") == "\n".join(released)


def test_ours_is_ours_and_ends_where_the_prompt_begins(released: list[str]) -> None:
    assert read_instruction("sana_lab") == SANA_LAB
    assert SANA_LAB.endswith("\nCaption: ")
    words = {tuple(text.lower().split()[i : i + 6]) for text in ["\n".join(released)] for i in range(200)}
    ours = SANA_LAB.lower().split()
    assert not any(tuple(ours[i : i + 6]) in words for i in range(len(ours) - 5))


def test_a_file_or_the_text_itself(tmp_path: Path) -> None:
    (tmp_path / "chi.txt").write_text("Häuser first.\nPrompt: ", encoding="utf-8-sig")
    assert read_instruction(f"file:{tmp_path}/chi.txt") == "Häuser first.\nPrompt: "
    assert read_instruction("draw this: ") == "draw this: "
    assert read_instruction(None) == read_instruction("") == ""


@pytest.mark.parametrize(
    ("instruction", "words"),
    [
        ("sanalab", "did you mean 'sana_lab'"),
        ("file:nowhere.txt", "'nowhere.txt' cannot be read as text: .*No such file"),
    ],
)
def test_instructions_that_are_none(instruction: str, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        Llm(instruction=instruction)


def test_without_diffusers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SpecError, match=r"pip install 'sana_lab\[diffusers\]'"):
        read_instruction("released")
