"""The small CLIP's LightningModule at tiny size: its loss, its wrong captions, and what it is judged by."""

import math

import numpy as np
import pytest
import torch
from tiny_world import DATA, fit, world_data

from sana_lab.config.specs import SpecError
from sana_lab.shapes import scenes as world
from sana_lab.shapes import train_clip
from sana_lab.shapes.networks import Clip
from sana_lab.shapes.train_clip import (
    ClipSystem,
    also_true,
    contrastive_loss,
    margins,
    one_word_outcomes,
    retrieval_outcomes,
    wrong_captions,
)
from sana_lab.shapes.wrong_captions import meaning, truths

# Lightning 2.6 asks torch >= 2.13 a deprecated question about pytrees
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

SIZES = {"width": 16, "layers": 1, "text_layers": 1, "heads": 2, "patch": 16, "dim": 8}


def tiny(**options) -> ClipSystem:
    torch.manual_seed(0)
    return ClipSystem(**SIZES, optimizer={"name": "adamw", "lr": 1e-2}, warmup=2, **options)


def test_captions_alone_can_be_learned():
    """Of one batch, by heart."""
    network, data = tiny().network, world_data()
    batch, spare = data.batch_at(range(8)), also_true(world.scenes(data.seed, range(8)), data.prompts_at(range(8)))
    optimizer, losses = torch.optim.Adam(network.parameters(), 1e-2), []
    for _ in range(40):
        loss = contrastive_loss(
            network.scale * network.image_features(batch.images) @ network.text_features(batch.prompts).T, spare
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_network_alone_is_left_behind(tmp_path):
    system = tiny(ema=0.5)
    fit(system, tmp_path, 1)
    assert system.trained().keys() == {f"network.{k}" for k in system.network.state_dict()}


def test_attributes_are_learned_beside(tmp_path):
    _, losses = fit(tiny(), tmp_path, 20)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_validates(tmp_path):
    run, _ = fit(tiny(), tmp_path, 1, limit_val_batches=2, val_check_interval=1, check_val_every_n_epoch=None)
    assert {k for k in run.callback_metrics if k.startswith("val/")} == {"val/retrieval", "val/one_word"}


def test_resumes_exactly(tmp_path):
    _, whole = fit(tiny(), tmp_path, 4)
    run, first = fit(tiny(), tmp_path, 4, limit_train_batches=2, max_epochs=1)
    run.save_checkpoint(tmp_path / "half.ckpt")
    _, second = fit(tiny(), tmp_path, 4, path=tmp_path / "half.ckpt")
    assert first + second == pytest.approx(whole, rel=1e-3)


def test_the_loss_is_clips():
    """By hand: two pictures, a wrong caption more, and one caption that is also true of the other picture."""
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.5, 1.0, -1.0]])
    none = torch.zeros(2, 3, dtype=torch.bool)

    def own(own: float, *others: float) -> float:
        return -math.log(math.exp(own) / sum(map(math.exp, (own, *others))))

    pictures = (own(2, 0, 1) + own(1, 0.5, -1)) / 2
    captions = (own(2, 0.5) + own(1, 0)) / 2
    assert contrastive_loss(logits, none).item() == pytest.approx((pictures + captions) / 2)
    spare = none.clone()
    spare[0, 1] = True
    pictures, captions = (own(2, 1) + own(1, 0.5, -1)) / 2, (own(2, 0.5) + own(1)) / 2
    assert contrastive_loss(logits, spare).item() == pytest.approx((pictures + captions) / 2)


def test_what_is_also_true_is_no_rival():
    rows = world.scenes(0, range(64))
    prompts = world.prompts(rows, 0, range(64))
    spare = also_true(rows, [*prompts, prompts[3], "nothing of the kind"])
    assert not spare[:, :64].diagonal().any()
    assert spare[3, 64]
    assert not spare[:, 65].any()
    for i, j in spare[:, :64].nonzero().tolist():
        assert meaning(prompts[j]) in truths(world.scene(rows, i))
    assert spare[:, :64].any(), "64 scenes share captions"


def test_wrong_captions_are_wrong():
    rows = world.scenes(0, range(64))
    prompts = world.prompts(rows, 0, range(64))
    wrong = wrong_captions(prompts, 3, np.random.default_rng(0))
    assert len(wrong) == 3 * 64
    assert wrong == wrong_captions(prompts, 3, np.random.default_rng(0))
    for i, text in enumerate(wrong):
        assert text != prompts[i // 3]
        assert meaning(text) not in truths(world.scene(rows, i // 3))
    assert wrong_captions(["nothing of the kind"], 2, np.random.default_rng(0)) == ["nothing of the kind"] * 2


def test_judged_by_hand():
    network, data = Clip(**SIZES), world_data()
    batch, rows = data.batch_at(range(8), "val"), world.scenes(-1, range(8))
    cosines = (network.image_features(batch.images) @ network.text_features(batch.prompts).T).detach()
    spare = also_true(rows, batch.prompts)
    best = [all(spare[i, j] or cosines[i, j] <= cosines[i, i] for j in range(8)) for i in range(8)]
    assert retrieval_outcomes(network, batch, rows) == [float(b) for b in best]
    gaps = margins(network, batch, rows)
    assert one_word_outcomes(network, batch, rows) == [float(min(g) > 0) for g in gaps]
    assert sum(map(len, margins(network, batch, rows, "color"))) < sum(map(len, gaps))


def test_held_out_report():
    system = tiny()
    system.experiment = {"data": DATA}
    report = train_clip.held_out(system, n=20, rivals=16)
    assert report.values.keys() == {"retrieval", "one_word"}
    assert all(v.n == len(report.per_image[k]) == 20 for k, v in report.values.items())


@pytest.mark.parametrize("odd", [{"patch": 7}, {"width": 18, "heads": 4}, {"max_tokens": 1}])
def test_a_network_that_does_not_fit_is_refused(odd):
    with pytest.raises(SpecError, match="expected a patch that divides 64"):
        Clip(**{**SIZES, **odd})


def test_negatives_cannot_be_fewer_than_none():
    with pytest.raises(SpecError, match="negatives is -1"):
        tiny(negatives=-1)


def test_texts_of_any_length_keep_their_end():
    network = Clip(**SIZES, max_tokens=4).eval()
    prompts = ["a red circle", "a red circle above a square", "a red circle above"]
    assert network.are_truncated(prompts) == [False, True, True]
    short, *long = network.text_features(prompts).detach()
    assert torch.allclose(network.text_features(["a red circle"])[0], short, atol=1e-5)
    assert torch.allclose(*long, atol=1e-5)
