import hashlib
import random
import unicodedata

import pytest
import torch

from sana_lab.models.text.tokenizer import (
    BOS,
    COMMON,
    EOS,
    FRAGMENTS,
    PAD,
    WORLD,
    offline_tokenizer,
    pad_rows,
    token_rows,
    vocabulary,
)
from sana_lab.shapes import scenes

TEXTS = [
    "A Red Circle",
    "zebra-crossing, it's 3.5 m wide!",
    "日本の猫 and 🎈",
    "tab\tnewline\nnull\x00",
    "snake_case CamelCase",
    "café naïve",
    "<pad> </s> <s>",
    "Ġ",
]


STARTING = offline_tokenizer(start=True)


def tokens(text: str) -> list[str]:
    return STARTING.convert_ids_to_tokens(STARTING([text])["input_ids"][0])[1:]


def test_the_vocabulary_never_changes() -> None:
    """Weights that ship were trained with these ids: whoever changes them must train those again."""
    digest = hashlib.sha256("\n".join([*vocabulary(), FRAGMENTS]).encode()).hexdigest()
    assert digest == "b612e45560b31d48c928b90ecd5998d82eee5307d392e08e00be4545501b8f26"
    tokenizer = offline_tokenizer(start=False)
    assert tokenizer.get_vocab() == {token: i for i, token in enumerate(vocabulary())}
    assert [tokenizer.convert_tokens_to_ids(t) for t in (PAD, EOS, BOS)] == [0, 1, 2]


def test_each_word_of_the_world_is_one_token() -> None:
    for word in (WORLD + COMMON).split():
        assert tokens(word) == [f"Ġ{word}"]
    rows = scenes.scenes(0, range(300))
    captions = [c for i in range(300) for c in scenes.captions(scenes.scene(rows, i))]
    for caption in set(captions):
        assert tokens(caption) == [f"Ġ{word}" for word in caption.replace(",", " ,").split()]


def test_words_count_alike_wherever_they_stand() -> None:
    assert tokens("(red) RED,red\n\nred-red") == ["Ġ(", "Ġred", "Ġ)", "Ġred", "Ġ,", "Ġred", "Ġred", "Ġ-", "Ġred"]


@pytest.mark.parametrize("text", TEXTS)
def test_nothing_is_lost_but_case_and_space(text: str) -> None:
    decoded = STARTING.decode(STARTING([text])["input_ids"][0][1:])
    assert "".join(decoded.split()) == "".join(unicodedata.normalize("NFC", text).lower().split())


def test_random_letters_are_never_lost() -> None:
    letters = random.Random(0)
    tokenizer = offline_tokenizer(start=False)
    for _ in range(200):
        text = "".join(
            chr(letters.choice([letters.randint(33, 126), letters.randint(0x3041, 0x30FF)])) for _ in range(20)
        )
        decoded = tokenizer.decode(tokenizer([text])["input_ids"][0][:-1])
        assert decoded.replace(" ", "") == unicodedata.normalize("NFC", text).lower()


def test_special_tokens_in_a_prompt_are_text() -> None:
    for start, frame in ((True, [2]), (False, [1])):
        ids = offline_tokenizer(start=start)(["<pad> </s> <s>"])["input_ids"][0]
        assert [i for i in ids if i < 3] == frame


def test_unlisted_words_are_shorter_than_their_bytes() -> None:
    assert tokens("astronaut") == ["Ġ", "a", "st", "r", "on", "a", "ut"]
    assert tokens("猫") == ["Ġ", *("猫".encode()[i : i + 1].decode("latin-1").translate({0x8C: "Į"}) for i in range(3))]


def test_cutting_keeps_the_end_or_the_beginning() -> None:
    text = "a red circle left of a blue square"
    assert token_rows(offline_tokenizer(start=False), [text, ""], 4)[0][-1] == 1
    assert token_rows(offline_tokenizer(start=True), [text, ""], 4)[0][0] == 2
    assert [len(row) for row in token_rows(offline_tokenizer(start=True), [text, ""], 4)] == [4, 1]


def test_padded_rows() -> None:
    ids, mask = pad_rows([[5, 6, 7], [8], []], fill=9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9], [9, 9, 9]]
    assert mask.tolist() == [[True] * 3, [True, False, False], [True, False, False]]
    assert pad_rows([[5]], fill=0, length=4)[0].tolist() == [[5, 0, 0, 0]]
    assert ids.dtype == torch.long
