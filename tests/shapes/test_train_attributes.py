"""The attribute network's LightningModule at tiny size, and the truth it learns from."""

import lightning as L
import numpy as np
import pytest
import torch
from tiny_world import DATA, fit, world_data

from sana_lab.config.specs import SpecError
from sana_lab.shapes import scenes as world
from sana_lab.shapes import train_attributes
from sana_lab.shapes.data import Shapes
from sana_lab.shapes.labels import cell_classes, class_counts, held_out_scenes, training_scenes
from sana_lab.shapes.networks import CLASSES, Attributes
from sana_lab.shapes.scenes import COLORS, SHAPES
from sana_lab.shapes.train_attributes import AttributesSystem, count_outcomes
from sana_lab.types import Batch

# Lightning 2.6 asks torch >= 2.13 a deprecated question about pytrees
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

GROUND = CLASSES


def tiny(**options) -> AttributesSystem:
    torch.manual_seed(0)
    return AttributesSystem((8, 8), {"name": "adamw", "lr": 1e-2}, warmup=2, **options)


def test_learns(tmp_path):
    _, losses = fit(tiny(ema=0.9), tmp_path, 40)
    assert sum(losses[-5:]) < 0.4 * sum(losses[:5])


def test_validates_with_the_average(tmp_path):
    system = tiny(ema=0.5)
    run, _ = fit(system, tmp_path, 2, limit_val_batches=3, val_check_interval=2, check_val_every_n_epoch=None)
    names = {k for k in run.callback_metrics if k.startswith("val/")}
    assert names == {f"val/{what}_accuracy" for what in ("scene", "number", "shape", "color")}
    kept = system.trained()
    assert all(k.startswith("network.") for k in kept)
    assert any(not v.equal(system.state_dict()[k]) for k, v in kept.items())


def test_resumes_exactly(tmp_path):
    _, whole = fit(tiny(), tmp_path, 4)
    run, first = fit(tiny(), tmp_path, 4, limit_train_batches=2, max_epochs=1)
    run.save_checkpoint(tmp_path / "half.ckpt")
    later = tiny()
    _, second = fit(later, tmp_path, 4, path=tmp_path / "half.ckpt")
    assert first + second == pytest.approx(whole, rel=1e-4)
    assert later.average.updates == 4


def test_other_pictures_are_refused(tmp_path):
    with pytest.raises(ValueError, match="from data: shapes; given NoneType"):
        training_scenes(L.Trainer(accelerator="cpu", logger=False), world_data().batch_at(range(8)))
    with pytest.raises(ValueError, match="expected data: shapes"):
        held_out_scenes([0], Batch(torch.zeros(1, 3, 64, 64), ["a circle"]))
    with pytest.raises(ValueError, match=r"images of 64 px; given \(8, 3, 32, 32\)"):
        fit(tiny(), tmp_path, 1, data=Shapes(size=32, batch=8))


def test_held_out_report_says_how_many():
    system = tiny()
    system.experiment = {"data": DATA}
    report = train_attributes.held_out(system, n=20, batch=8)
    assert report.values.keys() == report.per_image.keys()
    assert all(v.n == len(report.per_image[k]) == 20 for k, v in report.values.items())
    with pytest.raises(SpecError, match="has no experiment"):
        train_attributes.held_out(tiny())


def test_a_network_without_stages_is_refused():
    with pytest.raises(SpecError, match=r"widths is \[\], expected"):
        Attributes(())


# --- truth


def test_counts_are_those_of_the_scenes():
    rows = world.scenes(0, range(50))
    counts = class_counts(rows)
    assert counts.shape == (50, CLASSES)
    for i in range(50):
        expected = np.zeros(CLASSES, int)
        for thing in world.scene(rows, i).things:
            expected[SHAPES.index(thing.shape) * len(COLORS) + COLORS.index(thing.color)] += 1
        assert counts[i].tolist() == expected.tolist()


def test_cells_hold_the_color_that_was_drawn():
    """At every pixel for a cell: an object's middle has its class and its colour, and the ground's cells are grey."""
    rows = world.scenes(0, range(20))
    cells = cell_classes(rows, 64).unflatten(1, (64, 64))
    images = torch.from_numpy(world.render(rows, 64)).long()
    ground = torch.tensor(world.BACKGROUND)[:, None]
    for i in range(20):
        assert (images[i][:, cells[i] == GROUND] == ground).float().mean() > 0.95  # but for soft edges
        for thing in world.scene(rows, i).things:
            x, y = (int(v * 64) for v in thing.center)
            assert divmod(int(cells[i, y, x]), 10) == (SHAPES.index(thing.shape), COLORS.index(thing.color))
            assert tuple(images[i, :, y, x].tolist()) == world.PALETTE[thing.color]
    assert cell_classes(rows).shape == (20, 64)


def test_outcomes():
    truth = torch.zeros(4, CLASSES, dtype=torch.long)
    truth[:, 3] = 2  # two circles of the fourth colour
    found = truth.clone()
    found[1, [3, 4]] = torch.tensor([1, 1])  # one of another colour
    found[2, [3, 13]] = torch.tensor([1, 1])  # one of another shape
    found[3, 3] = 1  # one too few
    right = count_outcomes(found, truth)
    assert right["scene_accuracy"].tolist() == [1, 0, 0, 0]
    assert right["number_accuracy"].tolist() == [1, 1, 1, 0]
    assert right["shape_accuracy"].tolist() == [1, 1, 0, 0]
    assert right["color_accuracy"].tolist() == [1, 0, 1, 0]
