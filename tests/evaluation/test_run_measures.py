"""A suite draws and reads each image once, shows it to every measure that wants it, and refuses before it draws."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from sana_lab.evaluation import Measure, Report
from sana_lab.evaluation.run_measures import Source, run
from sana_lab.intervals import Estimate
from sana_lab.types import Json

CAPTIONS = [{"prompt": f"picture {i}"} for i in range(5)]


class Seen(Measure):
    """Remembers what it was shown."""

    def __init__(self, rows: list[Json] | None = None, each: int = 1, reference: bool = False) -> None:
        self.rows, self.images_per_prompt, self.needs_reference = rows, each, reference
        self.images: list[int] = []
        self.prompts: list[str] = []
        self.real = 0

    def refer(self, images: Tensor) -> None:
        self.real += len(images)

    def add(self, images: Tensor, rows: Sequence[Json]) -> None:
        self.images += images[:, 0, 0, 0].tolist()
        self.prompts += [row["prompt"] for row in rows]

    def report(self) -> Report:
        return Report({"n": Estimate(len(self.images), None, None, len(self.images))}, {})


class Generated(Seen):
    """Needs images, whatever they were generated from."""

    needs_captions = False


class Drawer:
    """Image i is filled with its noise index; counts calls."""

    def __init__(self) -> None:
        self.drawn: list[int] = []

    def __call__(self, prompts: list[str], indices: list[int]) -> Tensor:
        self.drawn += indices
        return torch.tensor(indices, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)


def test_measures_of_the_same_prompts_share_one_pass():
    draw, a, b = Drawer(), Seen(), Seen(list(CAPTIONS))
    found = run({"a": a, "b": b}, Source(draw, CAPTIONS), batch=2)
    assert draw.drawn == a.images == b.images == [0, 1, 2, 3, 4]
    assert a.prompts == [row["prompt"] for row in CAPTIONS]
    assert found["a"].values["n"].value == 5


def test_own_prompts_and_several_images_of_each_are_a_pass_of_their_own():
    draw, a, b = Drawer(), Seen(), Seen([{"prompt": "x"}, {"prompt": "y"}], each=3)
    run({"a": a, "b": b}, Source(draw, CAPTIONS), batch=4)
    assert draw.drawn == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]
    assert b.prompts == ["x"] * 3 + ["y"] * 3
    assert b.images == [0, 1, 2, 3, 4, 5]


def test_real_images_are_read_once_for_all_that_compare():
    reads = []

    def real():
        reads.append(1)
        yield torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
        yield torch.zeros(2, 3, 4, 4, dtype=torch.uint8)

    a, b, c = Seen(reference=True), Seen(reference=True), Seen()
    run({"a": a, "b": b, "c": c}, Source(Drawer(), CAPTIONS, real), batch=8)
    assert ([a.real, b.real, c.real], len(reads)) == ([5, 5, 0], 1)


@pytest.mark.parametrize(
    ("measures", "captions", "words"),
    [
        ({}, CAPTIONS, "at least one measure"),
        ({"a": Seen()}, [], "'a' has no prompts of its own"),
        ({"a": Seen(reference=True)}, CAPTIONS, "'a' needs real images"),
        ({"a": Seen()}, [*CAPTIONS, {"prompt": ""}], "scores images against captions, and 1 of 6 held-out"),
        ({"a": Generated()}, [{"prompt": "", "image": "b.png"}], "generated from captions, and 1 of 1 .*: 'b.png'"),
    ],
)
def test_what_a_subject_cannot_give_is_said_before_it_draws(measures, captions, words):
    draw = Drawer()
    with pytest.raises(ValueError, match=words):
        run(measures, Source(draw, captions), batch=2)
    assert draw.drawn == []


def test_images_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="expected 5 uint8 images"):
        run({"a": Seen()}, Source(lambda prompts, indices: torch.zeros(5, 3, 4, 4), CAPTIONS), batch=8)


def test_data_without_text_generate_from_the_empty_prompt():
    measure = Generated()
    run({"a": measure}, Source(Drawer(), [{"prompt": ""}] * 3), batch=2)
    assert measure.prompts == [""] * 3
