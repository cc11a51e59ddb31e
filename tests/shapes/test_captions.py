"""Captions of the embedded world: truth, variety, shares of colours and relations, independence of the batch."""

import re

import numpy as np
import pytest
import tiny_world  # noqa: F401

from sana_lab.evaluation.geneval.vocabulary import COLORS, NUMBERS, plural
from sana_lab.models.text.tokenizer import offline_tokenizer
from sana_lab.shapes import captions
from sana_lab.shapes import scenes as world
from sana_lab.shapes.captions import PLACES, RELATIONS, STYLES, Style
from sana_lab.shapes.data import Shapes
from sana_lab.shapes.scenes import OPPOSITE, SHAPES, Scene, relation

N = 3000
ROWS = world.scenes(5, range(N))
SCENES = [world.scene(ROWS, i) for i in range(N)]
NOUNS = {**{s: s for s in SHAPES}, **{plural(s): s for s in SHAPES}}


def texts(style: Style) -> list[str]:
    return captions.prompts(ROWS, 5, range(N), 0, style)


def colored_nouns(text: str) -> list[tuple[str, str | None]]:
    """(shape, colour or None) of each noun in a caption, whether the colour stands before or after it."""
    words = re.findall(r"\w+", text)
    at = [i for i, word in enumerate(words) if word in NOUNS]
    named = []
    for n, i in enumerate(at):
        end = at[n + 1] - 1 if n + 1 < len(at) else len(words)  # the next noun may have its colour before it
        after = next((w for w in words[i + 1 : i + 4] if w in COLORS and words.index(w, i) < end), None)
        named.append((NOUNS[words[i]], words[i - 1] if words[i - 1] in COLORS else after))
    return named


def spoken_relation(text: str) -> str | None:
    """The relation that a caption states, of its first object to its second."""
    for how, forms in RELATIONS.items():
        if any(f" {form} a" in text for form in forms):
            return how
    for how, forms in PLACES.items():
        if any(form in text for form in forms):
            return OPPOSITE[how]
    return None


@pytest.mark.parametrize("style", ["detailed", "varied"])
def test_every_caption_names_the_objects_with_their_colours_and_nothing_else(style: Style) -> None:
    for scene, text in zip(SCENES, texts(style), strict=True):
        nouns = colored_nouns(text)
        if scene.kind == "count":
            first = scene.things[0]
            assert nouns == [(first.shape, nouns[0][1])], text
            assert nouns[0][1] in (None, first.color), text
            assert re.search(rf"\b({NUMBERS[len(scene.things)]}|{len(scene.things)})\b", text), text
            continue
        expected = {t.shape: t.color for t in scene.things}
        assert sorted(shape for shape, _ in nouns) == sorted(expected), text
        for shape, color in nouns:
            assert color in (None, expected[shape]), text


@pytest.mark.parametrize("style", ["detailed", "varied"])
def test_a_relation_is_the_scenes_own(style: Style) -> None:
    related = 0
    for scene, text in zip(SCENES, texts(style), strict=True):
        how = spoken_relation(text)
        if how is not None:
            order = [next(t for t in scene.things if t.shape == shape) for shape, _ in colored_nouns(text)]
            assert relation(order[0], order[1]) == how, text
            related += 1
    clear = sum(scene.kind == "pair" and relation(*scene.things) is not None for scene in SCENES)
    assert related / clear == pytest.approx(captions.RELATED, abs=0.05)


def test_most_captions_name_colours_and_geneval_style_half() -> None:
    share = {s: np.mean([any(c in text for c in COLORS) for text in texts(s)]) for s in STYLES}
    assert share["geneval"] == pytest.approx(0.5, abs=0.03)
    assert share["detailed"] == pytest.approx(captions.COLORED, abs=0.03)
    assert share["varied"] == pytest.approx(captions.COLORED, abs=0.03)


def form(scene: Scene, text: str) -> str:
    """A caption with its words for objects replaced."""
    for words, name in ((COLORS, "COLOR"), (NOUNS, "NOUN")):
        text = re.sub(rf"\b({'|'.join(words)})\b", name, text)
    return re.sub(r"\b(an?)\b", "a", text)


def test_varied_captions_have_many_forms_and_detailed_ones_those_of_geneval() -> None:
    forms = {s: {form(c, t) for c, t in zip(SCENES, texts(s), strict=True)} for s in STYLES}
    assert len(forms["varied"]) > 300
    assert forms["detailed"] <= forms["geneval"]


@pytest.mark.parametrize("style", STYLES)
def test_a_caption_depends_on_seed_index_and_draw_alone(style: Style) -> None:
    part = captions.prompts(world.scenes(5, [70, 3]), 5, [70, 3], 0, style)
    assert part == [texts(style)[70], texts(style)[3]]
    assert captions.prompts(ROWS, 5, range(N), 1, style) != texts(style)


def test_captions_fit_the_text_encoders() -> None:
    tokenizer = offline_tokenizer(start=False)
    assert max(len(tokenizer(text)["input_ids"]) for text in texts("varied")) <= 32


def test_the_data_module_takes_the_style() -> None:
    plain, varied = Shapes(held_out=8), Shapes(held_out=8, captions="varied")
    assert varied.prompts_at(range(20)) != plain.prompts_at(range(20))
    assert varied.prompts_at(range(20)) == list(varied.batch_of([(i, 0) for i in range(20)], "train").prompts)
    assert varied.prompts_at(range(8), "val") != plain.prompts_at(range(8), "val")
