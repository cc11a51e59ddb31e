"""The measure `emoji` and the features under it: true drawings score 1, other drawings and other tones do not."""

from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

from sana_lab.checkpoints import weights
from sana_lab.config import specs
from sana_lab.config.specs import SpecError
from sana_lab.emoji.measure import COLUMNS, EmojiMeasure
from sana_lab.emoji.networks import Features
from sana_lab.emoji.train_features import EmojiFeatures, distorted, held_out
from sana_lab.types import Part

DATA = {"name": "emoji", "held_out": 0.4}
SYSTEM = {"name": "emoji_features", "widths": [8, 8, 8, 16], "dim": 16, "drawings": 128, "warmup": 2}

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


@pytest.fixture
def file(emoji: Path) -> str:
    """Weights of a random network of features, with a card that names its system."""
    torch.manual_seed(0)
    network = Features(SYSTEM["widths"], SYSTEM["dim"])
    state = {f"network.{k}": v for k, v in network.state_dict().items()}
    weights.write(emoji / "features.safetensors", state, {"config": {"system": SYSTEM}})
    return str(emoji / "features.safetensors")


def measured(file: str, change=lambda pictures: pictures, **options) -> tuple[EmojiMeasure, dict[str, float]]:
    """The numbers of held-out drawings, changed."""
    measure = EmojiMeasure(DATA, file, device="cpu", neighbours=8, **options)
    pictures = measure.data.pictures([truth.row for truth in measure.truths])
    measure.add(change(pictures), measure.rows)
    return measure, {name: value.value for name, value in measure.report().values.items()}


def test_true_drawings_score_one(file: str):
    measure, values = measured(file)
    assert values == dict.fromkeys(COLUMNS, 1.0)
    report = measure.report()
    assert all(len(report.per_image[c]) == len(measure.rows) for c in COLUMNS if c != "emoji_tone")
    assert report.settings["partial"] is False
    assert [row["prompt"] for row in measure.rows] == measure.data.prompts_at(range(len(measure.rows)), "val")
    assert sum(map(sum, measure.details()["emoji"]["tones"])) == len(report.per_image["emoji_tone"])


def test_larger_pictures_are_reduced(file: str):
    _, values = measured(file, lambda pictures: pictures.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert values == dict.fromkeys(COLUMNS, 1.0)


def other_tones(measure_file: str) -> Tensor:
    """For each held-out drawing, the same concept in the next tone, or without one for the darkest."""
    measure = EmojiMeasure(DATA, measure_file, device="cpu")
    rows = measure.data.content.rows
    table = {(d.vendor, d.base, d.tones): i for i, d in enumerate(rows)}
    wanted = [(truth.drawing, truth.drawing.tones[0] % 5 + 1) for truth in measure.truths]
    return measure.data.pictures([table[d.vendor, d.base, (t,)] for d, t in wanted])


def test_another_tone_is_the_concept_and_not_the_drawing(file: str):
    others = other_tones(file)
    _, values = measured(file, lambda _: others)
    assert values["emoji_tone"] == values["emoji_recall_all"] == 0
    assert values["emoji_concept"] == 1


def test_noise_scores_nothing(file: str):
    _, values = measured(file, lambda x: torch.randint(0, 256, x.shape, dtype=torch.uint8))
    assert values["emoji_tone"] == 0
    assert values["emoji_recall_all"] < 0.2


def test_neighbours_are_the_nearest_drawings_of_the_vendor(file: str):
    measure, _ = measured(file)
    for truth in measure.truths:
        own = [i for i, d in enumerate(measure.data.content.rows) if d.vendor == truth.drawing.vendor]
        cosines = (measure.gallery @ measure.gallery[truth.row])[own]
        nearest = {own[i] for i in cosines.argsort(descending=True)[:8].tolist()}
        assert truth.neighbours[0] == truth.row
        assert set(truth.neighbours.tolist()) <= nearest | {truth.row}


def test_other_data_are_refused(file: str):
    for data in ("shapes", {"name": "emoji", "size": 32}):
        with pytest.raises(SpecError, match="measure 'emoji' compares with data: emoji at 64 px"):
            EmojiMeasure(data, file)


def test_the_extractor_gives_the_networks_features(file: str):
    extractor = specs.build("extractor", {"name": "emoji", "weights": file, "device": "cpu"})
    measure, _ = measured(file)
    pictures = measure.data.pictures([0, 1])
    torch.testing.assert_close(extractor.features(pictures), measure.gallery[:2], atol=1e-5, rtol=0)
    torch.testing.assert_close(extractor.features(pictures).norm(dim=1), torch.ones(2))
    assert extractor.identity()["extractor"] == "emoji"


def system() -> EmojiFeatures:
    torch.manual_seed(0)
    return specs.build("system", {**SYSTEM, "optimizer": {"name": "adamw", "lr": 1e-2}})


def test_features_learn_to_tell_drawings_apart(emoji: Path):
    data, losses, trained = specs.build("data", {**DATA, "batch": 16}), tiny.Losses(), system()
    run = tiny.trainer(24, callbacks=[losses], val_check_interval=24, check_val_every_n_epoch=None)
    run.fit(trained, datamodule=data)
    assert sum(losses.values[-4:]) < 0.8 * sum(losses.values[:4])
    assert 0 <= run.callback_metrics["val/retrieval"] <= 1
    assert {name.partition(".")[0] for name in trained.trained()} == {"network"}
    trained.experiment = {"data": DATA}
    report = held_out(trained)
    assert report.values["retrieval"].n == data.len_val
    assert report.settings["among"] == len(data.content.rows)


def test_features_of_other_data_and_too_few_classes(emoji: Path):
    with pytest.raises(ValueError, match="trained on data: emoji; given Shapes"):
        tiny.trainer(1, limit_val_batches=0).fit(system(), datamodule=specs.build("data", "shapes"))
    few = specs.build("system", {**SYSTEM, "drawings": 4})
    with pytest.raises(SpecError, match="drawings is 4, and the data has drawing"):
        tiny.trainer(1, limit_val_batches=0).fit(few, datamodule=specs.build("data", DATA))


def test_distortions_depend_on_the_generator_alone_and_keep_the_range():
    pictures = torch.rand(4, 3, 64, 64) * 2 - 1
    a, b, c = (distorted(pictures, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert a.shape == pictures.shape
    assert a.abs().max() <= 1
    halves = [distorted(pictures[2 * r : 2 * r + 2], torch.Generator().manual_seed(0), Part(r, 2)) for r in (0, 1)]
    torch.testing.assert_close(torch.cat(halves), a)
