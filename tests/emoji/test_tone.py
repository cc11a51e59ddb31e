"""The judge of skin tones: right on true drawings, wrong on others' tones, silent where there is no skin."""

from pathlib import Path

import pytest
import tiny_emoji
import torch
from torch import Tensor
from torch.nn import functional as F

from sana_lab.emoji import tone
from sana_lab.emoji.data import Emoji

REAL = Path(__file__).parents[2] / "emoji"


def variants(data: Emoji, base: str, vendor: str) -> Tensor:
    """(5, 3, 64, 64) uint8, light to dark."""
    table = {(d.base, d.vendor, d.tones): i for i, d in enumerate(data.content.rows)}
    return data.pictures([table[base, vendor, (t,)] for t in range(1, 6)])


@pytest.fixture
def data(emoji: Path) -> Emoji:
    return Emoji(held_out=0.0)


@pytest.mark.parametrize("vendor", ["noto", "twemoji"])
def test_true_drawings_and_their_blurred_copies(data: Emoji, vendor: str):
    for base in tiny_emoji.PEOPLE.values():
        pictures = variants(data, base, vendor)
        concept = tone.skin(pictures)
        assert [tone.judge(picture, concept) for picture in pictures] == [1, 2, 3, 4, 5]
        soft = F.avg_pool2d(pictures.float(), 3, 1, 1).round().byte()
        assert [tone.judge(picture, concept) for picture in soft] == [1, 2, 3, 4, 5]


def test_the_region_is_the_skin_without_its_edge(data: Emoji):
    concept = tone.skin(variants(data, "astronaut", "noto"))
    expected = torch.zeros(64, 64, dtype=torch.bool)
    expected[17:47, 17:47] = True
    assert torch.equal(concept.mask, expected)
    luminances = tone.luminance(concept.colors)
    assert all(abs(a - b) < 4 for a, b in zip(luminances.tolist(), tiny_emoji.SKIN["noto"], strict=True))


def test_no_skin_is_no_tone(data: Emoji):
    pictures = variants(data, "astronaut", "noto")
    concept = tone.skin(pictures)
    rows = {(d.label, d.vendor): i for i, d in enumerate(data.content.rows)}
    yellow = data.pictures([rows["astronaut", "noto"]])[0]
    noise = torch.randint(0, 256, (3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    plain = [torch.full((3, 64, 64), value, dtype=torch.uint8) for value in (0, 40, 255)]
    blue = torch.tensor([30, 60, 220], dtype=torch.uint8)[:, None, None].expand(3, 64, 64)
    assert [tone.judge(x, concept) for x in (yellow, noise, *plain, blue)] == [None] * 6


def test_a_concept_without_enough_skin_is_not_judged(data: Emoji):
    small = variants(data, "astronaut", "noto")[:, :, :1].expand(-1, -1, 64, -1)
    assert tone.skin(small) is None


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real archives in emoji/")
@pytest.mark.parametrize(
    ("vendor", "luminances"), [("noto", (224, 192, 149, 119, 89)), ("twemoji", (227, 214, 179, 136, 93))]
)
def test_every_real_drawing_is_judged_right(vendor: str, luminances: tuple[int, ...]):
    data = Emoji(str(REAL), vendors=vendor, held_out=0.0)
    table = {(d.base, d.tones): i for i, d in enumerate(data.content.rows)}
    bases = [b for b, tones in table if tones == (1,) and all((b, (t,)) in table for t in range(1, 6))]
    pictures = [variants(data, base, vendor) for base in bases]
    concepts = [(p, s) for p in pictures if (s := tone.skin(p)) is not None]
    assert len(concepts) >= len(bases) - 5
    assert [[tone.judge(x, s) for x in p] for p, s in concepts] == [[1, 2, 3, 4, 5]] * len(concepts)
    moved = [tone.judge(x.roll((4, 4), (1, 2)), s) == i + 1 for p, s in concepts for i, x in enumerate(p)]
    assert 0.6 < sum(moved) / len(moved) < 0.8
    means = tone.luminance(torch.stack([s.colors for _, s in concepts])).mean(0)
    assert means.tolist() == pytest.approx(luminances, abs=1)
    nobody = [i for i, d in enumerate(data.content.rows) if not d.tones]
    others = [tone.judge(picture, concepts[i % len(concepts)][1]) for i, picture in enumerate(data.pictures(nobody))]
    assert sum(judged == i % 5 + 1 for i, judged in enumerate(others)) < 0.05 * len(others)  # right by chance
