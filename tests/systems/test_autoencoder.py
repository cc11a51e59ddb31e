"""The autoencoder's LightningModule on tiny real parts."""

import math
from typing import Any

import lightning as L
import pytest
import tiny
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from skimage.metrics import peak_signal_noise_ratio

from sana_lab.config.specs import SpecError
from sana_lab.models.autoencoders.latent_structure import Transform, draw_transform, front_counts, keep_front
from sana_lab.shapes.data import Shapes
from sana_lab.systems.autoencoder import AutoencoderSystem, psnr, ramp
from sana_lab.types import Batch, Part

# Lightning 2.6 asks torch >= 2.13 a deprecated question about pytrees
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

VAE = tiny.VAE_2X
VAE_CHANNELS = 4


def world(size: int = 16) -> Shapes:
    return Shapes(size=size, batch=8, held_out=16)


def fit(system, steps: int, path=None, size: int = 16, **options) -> tuple[L.Trainer, list[float]]:
    losses = tiny.Losses()
    run = tiny.trainer(steps, callbacks=[losses], **options)
    run.fit(system, datamodule=world(size), ckpt_path=path)
    return run, losses.values


@pytest.mark.parametrize("spec", [VAE, tiny.DCAE], ids=["vae", "dcae"])
def test_learns_and_normalises(spec):
    torch.manual_seed(0)
    system = AutoencoderSystem(spec, l1=0.1, l2=1.0, latent_noise=0.02, lr=3e-3, warmup=5, ema=0.9)
    run, losses = fit(system, 60)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    run.validate(system, datamodule=world(), verbose=False)
    assert 10 < run.callback_metrics["val/psnr"] < 60
    assert 0 < run.callback_metrics["val/ssim"] < 1
    with system.average.swapped(system.autoencoder):
        latents = system.autoencoder.encode(world().batch_at(range(1024)).images)
    assert latents.mean((0, 2, 3)).abs().max() < 0.05
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.05


def test_validation_is_of_the_average():
    system = AutoencoderSystem(VAE)
    run = tiny.trainer(1)
    run.validate(system, datamodule=world(), verbose=False)
    expected = run.callback_metrics["val/psnr"].item()
    system.average.updates = 1  # as after a step
    for p in system.autoencoder.parameters():
        p.data.zero_()
    run.validate(system, datamodule=world(), verbose=False)
    assert run.callback_metrics["val/psnr"].item() == pytest.approx(expected, abs=1e-4)
    assert all(not p.any() for p in system.autoencoder.parameters())


def test_resumes_exactly(tmp_path):
    def system() -> AutoencoderSystem:
        torch.manual_seed(0)
        return AutoencoderSystem(VAE, latent_noise=0.5, warmup=2)

    _, whole = fit(system(), 6)
    half = system()
    run, first = fit(half, 6, limit_train_batches=3, max_epochs=1)
    run.save_checkpoint(tmp_path / "half.ckpt")
    state = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert state["average"]["updates"] == 3
    later = system()
    _, second = fit(later, 6, path=tmp_path / "half.ckpt")
    assert later.average.updates == 6
    assert first + second == pytest.approx(whole, rel=1e-4)


@pytest.mark.filterwarnings("ignore:.*no pre-optimization state was saved")
@pytest.mark.parametrize("adversarial", [0.0, 0.1])
def test_a_checkpoint_holds_the_average_after_its_step(adversarial, tmp_path):
    """Written by ModelCheckpoint, whose turn comes before the module's own at the end of a batch."""
    system = AutoencoderSystem(VAE, adversarial=adversarial, adversarial_start=100, discriminator_width=4)
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4)
    tiny.trainer(4, callbacks=[keep], enable_checkpointing=True).fit(system, datamodule=world(24))
    kept = torch.load(tmp_path / "step=4.ckpt", weights_only=True)["average"]
    assert kept["updates"] == system.average.updates == 4
    assert all(v.equal(system.average.values[k]) for k, v in kept["values"].items())


def test_a_checkpoint_rebuilds_the_system(tmp_path):
    system = AutoencoderSystem(VAE)
    run, _ = fit(system, 2)
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = AutoencoderSystem.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    images = world().batch_at(range(2)).images
    assert again.autoencoder.encode(images).equal(system.autoencoder.encode(images))
    assert again.average.state()["updates"] == 2


def test_adversarial_training_moves_both_players():
    system = AutoencoderSystem(VAE, adversarial=0.1, adversarial_start=2, discriminator_width=4)
    names = dict(system.named_parameters())
    before = {k: v.detach().clone() for k, v in names.items()}
    fit(system, 6, size=24)
    moved = {k.split(".")[0] for k, v in names.items() if not v.equal(before[k])}
    assert moved == {"autoencoder", "discriminator"}


def test_the_critic_waits_for_its_start():
    system = AutoencoderSystem(VAE, adversarial=0.1, adversarial_start=100, discriminator_width=4)
    before = [p.detach().clone() for p in system.discriminator.parameters()]
    fit(system, 3)
    assert all(a.equal(b) for a, b in zip(before, system.discriminator.parameters(), strict=True))


def test_lpips_without_a_file_is_refused():
    with pytest.raises(ValueError, match="LPIPS needs torchvision's VGG-16 weights"):
        AutoencoderSystem(VAE, lpips=0.5)


def test_cosine_without_an_end_is_refused():
    run = tiny.trainer(-1, max_epochs=1, limit_train_batches=1)
    with pytest.raises(ValueError, match=r"needs trainer\.max_steps"):
        run.fit(AutoencoderSystem(VAE), datamodule=world())


def test_kl_is_counted_per_image_value():
    torch.manual_seed(0)
    system = AutoencoderSystem(VAE)
    images = torch.randn(2, 3, 8, 8)
    mean, log_variance = system.autoencoder.posterior(images)
    expected = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum() / (2 * 3 * 8 * 8)
    torch.testing.assert_close(system.compress(images, torch.Generator())[1], expected)


def test_latents_alone_are_refused():
    batch = Batch(None, ["a circle"], torch.zeros(1, 4, 2, 2))
    with pytest.raises(ValueError, match="an autoencoder trains on images"):
        AutoencoderSystem(VAE).validation_step(batch, 0)


def test_ramp():
    assert [ramp(s, 4, "constant", 10) for s in (0, 1, 3, 9)] == [0.25, 0.5, 1.0, 1.0]
    assert ramp(50, 1, "cosine", 100) == pytest.approx(0.5)
    assert ramp(100, 1, "cosine", 100) == pytest.approx(0.0)
    assert ramp(25, 1, "cosine", 100) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert ramp(25, 1, "cosine", 10**6, 0.5) == pytest.approx(0.5)
    assert ramp(25, 1, "cosine", 10**6, 1.0) == pytest.approx(0.0)
    assert ramp(75, 1, "cosine", 100, 0.25) == ramp(75, 1, "cosine", 100)


def test_psnr_equals_skimage():
    a, b = torch.rand(2, 3, 3, 8, 8, dtype=torch.float64) * 2 - 1
    expected = [peak_signal_noise_ratio(x.numpy(), y.numpy(), data_range=2) for x, y in zip(a, b, strict=True)]
    assert psnr(b, a).tolist() == pytest.approx(expected)


# --- structure of latents


def test_front_channels_stay_and_the_others_are_zero():
    z = torch.rand(300, 8, 2, 3) + 1
    kept = keep_front(z, 3, torch.Generator().manual_seed(0))
    counts = (kept != 0).all((2, 3)).sum(1)
    assert front_counts(8, 3) == [3, 6, 8]
    assert sorted(set(counts.tolist())) == [3, 6, 8]
    assert all(60 < int((counts == n).sum()) < 140 for n in (3, 6, 8))
    for one, whole, count in zip(kept, z, counts.tolist(), strict=True):
        assert torch.equal(one[:count], whole[:count])
        assert not one[count:].any()
    halves = [keep_front(z[i::2].repeat(1, 1, 1, 1), 3, torch.Generator().manual_seed(0), Part(i, 2)) for i in range(2)]
    both = torch.cat([(half != 0).all((2, 3)).sum(1) for half in halves])
    assert torch.equal(both, counts)


def test_a_transform_moves_latents_and_images_alike():
    """A quarter turn takes the pixels of a cell to the cell that its latent is taken to."""
    latents = torch.arange(6.0).reshape(1, 1, 2, 3)
    images = latents.repeat_interleave(4, 2).repeat_interleave(4, 3)
    for turns in range(4):
        transform = Transform((2, 3), turns)
        assert torch.equal(transform.of(images, 4)[:, :, ::4, ::4], transform.of(latents))
    assert torch.equal(Transform((2, 3), 1).of(latents)[0, 0], torch.tensor([[2.0, 5.0], [1.0, 4.0], [0.0, 3.0]]))
    halved = Transform((1, 1), 0)
    assert halved.of(torch.rand(2, 5, 4, 4)).shape == (2, 5, 1, 1)
    assert halved.of(torch.rand(2, 3, 32, 32), 8).shape == (2, 3, 8, 8)


def test_transforms_cover_scales_and_turns_and_bear_their_share():
    random = torch.Generator().manual_seed(0)
    drawn = [draw_transform((8, 16), 8, 0.5, random) for _ in range(400)]
    transforms = [t for t in drawn if t is not None]
    assert 160 < len(transforms) < 240
    assert {t.turns for t in transforms} == {0, 1, 2, 3}
    assert {t.side[0] for t in transforms} == {4, 5, 6, 7, 8}  # from 32 pixels on
    assert {t.side[1] for t in transforms} >= {4, 8, 12, 16}
    assert draw_transform((2, 2), 8, 1.0, random).side == (2, 2)  # images of 16 pixels stay


def test_structure_changes_the_training_and_its_absence_does_not():
    def losses(**options) -> list[float]:
        torch.manual_seed(0)
        return fit(AutoencoderSystem(VAE, latent_noise=0.1, warmup=1, **options), 3, size=64)[1]

    plain = losses()
    assert losses(front_channels=VAE_CHANNELS) == plain  # all channels are its only number
    assert losses(equivariance=1e-9) == plain
    for options in ({"front_channels": 1}, {"equivariance": 1.0}):
        assert losses(**options) != plain


def test_equivariance_asks_for_the_transformed_image():
    system = AutoencoderSystem(VAE, equivariance=1.0)
    images = torch.rand(2, 3, 64, 64)
    given = torch.rand(2, 4, 32, 32)
    latents, target = system.disturb(given, images, torch.Generator().manual_seed(3))
    drawn = draw_transform((32, 32), 2, 1.0, torch.Generator().manual_seed(3))
    assert drawn is not None
    assert torch.equal(latents, drawn.of(given))
    assert torch.equal(target, drawn.of(images, 2))
    assert [2 * side for side in latents.shape[2:]] == [*target.shape[2:]]
    assert not (target.shape == images.shape and torch.equal(target, images))


def test_more_front_channels_than_channels_are_refused():
    with pytest.raises(SpecError, match=r"system\.front_channels is 9, and the autoencoder has 4 channels"):
        AutoencoderSystem(VAE, front_channels=9)


@pytest.mark.parametrize("options", [{"front_channels": 2}, {"equivariance": 0.5}])
def test_structure_of_latents_that_do_not_train_is_refused(options: dict[str, Any]):
    with pytest.raises(SpecError, match=rf"system\.{next(iter(options))} gives latents a structure, and trains: head"):
        AutoencoderSystem(VAE, trains="head", **options)
