"""The embedded world: determinism, spacing, colours, true captions, speed; and its data module."""

import itertools
import time

import lightning as L
import numpy as np
import pytest
import tiny
import tiny_world
import torch
from skimage.color import rgb2lab
from tiny_world import pack
from torch import Tensor, nn

from sana_lab.evaluation.geneval.rule import relations
from sana_lab.shapes import scenes as world
from sana_lab.shapes.data import Shapes
from sana_lab.types import Batch

ROWS = world.scenes(3, range(2000))
SCENES = [world.scene(ROWS, i) for i in range(2000)]


def test_a_scene_depends_on_seed_and_index_alone() -> None:
    images = tiny_world.images(7, range(20, 60))
    assert torch.equal(tiny_world.images(7, [45, 20, 59]), images[[25, 0, 39]])
    assert torch.equal(tiny_world.images(7, [31])[0], images[11])
    assert not torch.equal(tiny_world.images(8, [31])[0], images[11])


def test_uniform_numbers_are_uniform_and_independent() -> None:
    u = world.uniform(1, range(20000), 4)
    counts = np.histogram(u[:, 2], 20, (0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 45  # chi-square, 19 degrees: p = 0.0007
    assert np.abs(np.corrcoef(u.T) - np.eye(4)).max() < 0.03
    assert np.abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.03


def test_objects_keep_their_distance_and_stay_inside() -> None:
    for row in SCENES:
        for a, b in itertools.combinations(row.things, 2):
            assert np.hypot(a.center[0] - b.center[0], a.center[1] - b.center[1]) > a.radius + b.radius + 2.99 / 64
        for thing in row.things:
            assert min(thing.center) >= thing.radius
            assert max(thing.center) <= 1 - thing.radius


def test_all_kinds_counts_shapes_and_colors_occur() -> None:
    assert {row.kind for row in SCENES} == set(world.KINDS)
    assert set(ROWS.count.tolist()) == {1, 2, 3, 4}
    used = [thing for row in SCENES for thing in row.things]
    for names, share in ((world.SHAPES, 0.2), (world.COLORS, 0.07)):
        values = [thing.shape if names is world.SHAPES else thing.color for thing in used]
        assert min(values.count(name) for name in names) > share * len(used)


def test_counted_objects_are_equal_and_other_shapes_differ() -> None:
    for row in SCENES:
        shapes = {thing.shape for thing in row.things}
        assert len(shapes) == (1 if row.kind == "count" else len(row.things))
        assert row.kind != "count" or len({thing.color for thing in row.things}) == 1


def test_palette_is_apart_in_lab() -> None:
    lab = rgb2lab(np.array([*world.PALETTE.values(), world.BACKGROUND])[None] / 255)[0]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(lab, 2)) > 36
    assert world.BACKGROUND == (0x99, 0x99, 0x99)


def _fine(shape: str, radius: float, center: tuple[float, float], scale: int = 16) -> np.ndarray:
    """Coverage (64, 64) by counting subpixels against inequalities written from each shape's definition."""
    at = (np.arange(64 * scale) + 0.5) / scale
    x, y = at[None, :] - center[0], at[:, None] - center[1]
    half, arm, long = radius / 2**0.5, 0.34 * radius, 0.94 * radius
    corners = [(radius * np.sin(a), -radius * np.cos(a)) for a in (0, 2 * np.pi / 3, 4 * np.pi / 3)]
    sides = [
        (bx - ax) * (y - ay) - (by - ay) * (x - ax) >= 0
        for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True)
    ]
    inside = {
        "circle": x**2 + y**2 <= radius**2,
        "square": (abs(x) <= half) & (abs(y) <= half),
        "triangle": sides[0] & sides[1] & sides[2],
        "cross": ((abs(x) <= arm) & (abs(y) <= long)) | ((abs(y) <= arm) & (abs(x) <= long)),
    }[shape]
    return inside.reshape(64, scale, 64, scale).mean((1, 3))


@pytest.mark.parametrize("shape", world.SHAPES)
def test_edges_are_antialiased(shape: str) -> None:
    center, radius = (30.3, 33.8), 11.2
    thing = world.Thing(shape, "black", (center[0] / 64, center[1] / 64), radius / 64)
    image = world.render(pack([world.Scene("single", (thing,))]), 64)[0]
    cover = 1 - image[0] / 153
    truth = _fine(shape, radius, center)
    assert np.abs(cover - truth).max() < 0.4  # at corners, where the distance is a bound
    assert np.abs(cover - truth).mean() < 0.001
    assert cover.sum() == pytest.approx(truth.sum(), rel=0.01)
    found = world.objects(world.Scene("single", (thing,)), 64)[0]
    assert found.score * 64**2 == pytest.approx(truth.sum(), rel=0.01)
    rows, columns = np.nonzero(truth)
    assert np.abs(np.array(found.box) - (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)).max() < 1


def test_size_changes_the_resolution_and_not_the_scene() -> None:
    small, large = (tiny_world.images(0, range(16), size).double().numpy() for size in (32, 128))
    assert small.shape == (16, 3, 32, 32)
    reduced = large.reshape(16, 3, 32, 4, 32, 4).mean((3, 5))
    assert np.abs(reduced - small).mean() < 0.5
    assert tiny_world.images(0, [0], 45).shape == (1, 3, 45, 45)


def _said(caption: str) -> tuple[dict[str, int], list[tuple[str | None, str]], str | None]:
    """What a caption claims, read with its own little grammar: shapes counted, (color, shape) named, relation."""
    text = caption.removeprefix("a photo of ").replace(",", " and")
    where = next((w for w in world.OPPOSITE if f" {w} " in text), None)
    phrases = text.replace(f" {where} ", " and ").split(" and ")
    counts, named = {}, []
    for phrase in phrases:
        number, *color, noun = phrase.split()
        many = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4}[number]
        shape = next(s for s in world.SHAPES if noun in (s, s + "s", s + "es"))
        assert (noun == shape) == (many == 1)
        counts[shape] = counts.get(shape, 0) + many
        named.append((color[0] if color else None, shape))
    return counts, named, where


def test_every_caption_is_true_and_complete() -> None:
    for row in SCENES:
        truth = {o.label: [p for p in world.objects(row, 64) if p.label == o.label] for o in world.objects(row, 64)}
        for caption in world.captions(row):
            counts, named, where = _said(caption)
            assert counts == {label: len(found) for label, found in truth.items()}, caption
            assert all(color in (None, o.color) for color, shape in named for o in truth[shape]), caption
            if where:
                (_, a), (_, b) = named
                assert relations(truth[a][0], truth[b][0]) == {where}, caption


def test_captions_cover_the_six_patterns_and_are_chosen_by_index() -> None:
    texts = world.prompts(ROWS, 3, range(2000))
    assert texts[100:200] == world.prompts(world.scenes(3, range(100, 200)), 3, range(100, 200))
    assert texts != world.prompts(ROWS, 3, range(2000), draw=1)
    share = {word: np.mean([word in text for text in texts]) for word in ("a photo of", *world.OPPOSITE, " and ", "s")}
    assert 0.4 < share["a photo of"] < 0.6
    assert all(0.02 < share[where] < 0.2 for where in world.OPPOSITE)
    assert all(len(set(world.captions(row))) >= 4 for row in SCENES)


def test_more_than_2000_images_per_second_on_one_core() -> None:
    module, best = Shapes(), float("inf")
    for n in range(5):  # time of this thread alone, so that other work on the machine does not count
        start = time.thread_time()
        module.batch_at(range(64 * n, 64 * n + 64))
        best = min(best, time.thread_time() - start)
    assert 64 / best > 2000


# --- the data module ------------------------------------------------------------------------------------------------


class _Listener(L.LightningModule):
    """Remembers the prompts it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[list[str]] = []
        self.shown: list[int] = []

    def training_step(self, batch: Batch) -> Tensor:
        self.seen.append(batch.prompts)
        return self.weight * batch.images.mean()

    def validation_step(self, batch: Batch) -> None:
        self.shown.append(len(batch.prompts))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_batches_are_images_in_range_with_prompts() -> None:
    batch = Shapes(size=32, batch=5).batch_at([4, 9])
    assert batch.images is not None
    assert batch.images.shape == (2, 3, 32, 32)
    assert batch.images.dtype == torch.float32
    assert batch.images.min() >= -1
    assert batch.images.max() <= 1
    image, prompt = Shapes(size=32).example(9)
    assert torch.equal(((batch.images[1] + 1) * 127.5).round().byte(), torch.from_numpy(image))
    assert batch.prompts[1] == prompt


def test_the_stream_counts_through_the_scenes() -> None:
    module = Shapes(batch=3)
    batches = list(itertools.islice(module.train_dataloader(), 3))
    assert [p for b in batches for p in b.prompts] == module.batch_at(range(9)).prompts


def test_held_out_scenes_are_fixed_and_apart_from_training() -> None:
    one, two = Shapes(batch=4, held_out=10), Shapes(batch=5, held_out=10, seed=1)
    images = [torch.cat([b.images for b in module.val_dataloader()]) for module in (one, two)]
    assert len(images[0]) == one.len_val == 10
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], one.batch_at(range(10), "val").images)
    assert not torch.equal(images[0], one.batch_at(range(10)).images)
    with pytest.raises(IndexError, match="10 held-out"):
        one.example(10, "val")


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning's, not ours
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_goes_on_with_the_next_batch(tmp_path, accumulate: int) -> None:
    module, whole = Shapes(size=16, batch=2, held_out=3), _Listener()
    tiny.trainer(4, accumulate_grad_batches=accumulate, limit_val_batches=0).fit(whole, datamodule=module)
    first, second = _Listener(), _Listener()
    trainer = tiny.trainer(2, accumulate_grad_batches=accumulate, limit_val_batches=0)
    trainer.fit(first, datamodule=Shapes(size=16, batch=2, held_out=3))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    again = tiny.trainer(4, accumulate_grad_batches=accumulate, limit_val_batches=0)
    again.fit(second, datamodule=Shapes(size=16, batch=2, held_out=3), ckpt_path=tmp_path / "half.ckpt")
    assert first.seen + second.seen == whole.seen
    assert whole.seen[0] == module.batch_at([0, 1]).prompts
    assert len(whole.seen) == 4 * accumulate


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning's, not ours
def test_an_epoch_of_limited_length_does_not_repeat_scenes_and_validates_on_all() -> None:
    listener = _Listener()
    tiny.trainer(4, limit_train_batches=2).fit(listener, datamodule=Shapes(size=16, batch=2, held_out=3))
    assert [p for prompts in listener.seen for p in prompts] == Shapes(size=16).batch_at(range(8)).prompts
    assert listener.shown == [2, 1] * 2


@pytest.mark.parametrize(
    ("option", "value"), [("size", 0), ("batch", 0), ("seed", -1), ("held_out", 0), ("workers", -1)]
)
def test_options_out_of_range_are_named(option: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{option} is {value}; it must be at least"):
        Shapes(**{option: value})


def test_shares_of_kinds_are_the_training_scenes_alone():
    plain, singles = Shapes(held_out=8), Shapes(held_out=8, shares=[2, 0, 0, 0])
    assert {world.scene(world.scenes(0, range(50), singles.shares), i).kind for i in range(50)} == {"single"}
    assert singles.prompts_at(range(50)) != plain.prompts_at(range(50))
    assert singles.prompts_at(range(8), "val") == plain.prompts_at(range(8), "val")
    assert not any(" and " in p or " of " in p.removeprefix("a photo of ") for p in singles.prompts_at(range(50)))


@pytest.mark.parametrize("shares", [[1.0], [1, 1, 1, -1], [0, 0, 0, 0]])
def test_shares_name_the_kinds(shares: list[float]):
    with pytest.raises(ValueError, match=r"expected 4 numbers .* of single, pair, count, mixed"):
        Shapes(shares=shares)
