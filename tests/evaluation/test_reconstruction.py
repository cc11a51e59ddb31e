"""PSNR and SSIM against their definitions, scikit-image and torchmetrics."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn
from torchmetrics.functional.image import structural_similarity_index_measure

from sana_lab.autoencoders import Autoencoder
from sana_lab.evaluation import reconstruction
from sana_lab.types import Batch


class Quantiser(Autoencoder):
    """Gives images back in steps of 1 / levels: an autoencoder whose error is known."""

    def __init__(self, levels: float = 8.0) -> None:
        super().__init__(channels=3, downsample=1)
        self.levels = nn.Parameter(torch.tensor(levels))
        self.modes: list[bool] = []

    def posterior(self, images):
        self.modes.append(self.training)
        return (images * self.levels).round(), torch.full_like(images, -30.0)

    def reconstruct(self, z):
        return z / self.levels


def pairs(noise: float, size: tuple[int, int] = (40, 33), count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth uint8 images and noisy ones."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 5, 5, generator=generator) * 255
    clean = nn.functional.interpolate(coarse, size, mode="bilinear")
    noisy = clean + noise * torch.randn(clean.shape, generator=generator)
    return clean.round().byte(), noisy.round().clamp(0, 255).byte()


def batches(count: int, batch: int) -> list[Batch]:
    images = (pairs(0.0, count=count)[0].float() / 127.5) - 1
    return [Batch(part, [""] * len(part)) for part in images.split(batch)]


@pytest.mark.parametrize("noise", [0.6, 5.0, 60.0])
def test_psnr_and_ssim_agree_with_scikit_image(noise):
    a, b = pairs(noise)
    for k, (x, y) in enumerate(zip(a.numpy(), b.numpy(), strict=True)):
        psnr = peak_signal_noise_ratio(x, y, data_range=255)
        window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        ssim = structural_similarity(x, y, data_range=255, channel_axis=0, **window)
        assert reconstruction.psnr(a, b)[k].item() == pytest.approx(psnr, abs=1e-9)
        assert reconstruction.ssim(a, b)[k].item() == pytest.approx(ssim, abs=1e-9)


@pytest.mark.parametrize("noise", [0.6, 5.0, 60.0])
def test_ssim_agrees_with_torchmetrics(noise):
    """Within the image: torchmetrics' own mean also counts windows that hang over the border, on reflected pixels."""
    a, b = pairs(noise)
    window = {"gaussian_kernel": True, "sigma": 1.5, "kernel_size": 11, "data_range": 255.0}
    _, every = structural_similarity_index_measure(b.double(), a.double(), **window, return_full_image=True)
    expected = every[:, :, 5:-5, 5:-5].mean((1, 2, 3))
    torch.testing.assert_close(reconstruction.ssim(a, b), expected, atol=1e-6, rtol=0)


def test_ssim_agrees_with_a_loop_over_windows():
    a, b = (x[:1, :, :13, :12].double().numpy() for x in pairs(20.0))
    at = np.arange(11) - 5
    weights = np.exp(-(at[:, None] ** 2 + at**2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for c, top, left in np.ndindex(3, 3, 2):
        x, y = (v[0, c, top : top + 11, left : left + 11] for v in (a, b))
        mean_x, mean_y = (weights * x).sum(), (weights * y).sum()
        var_x, var_y = (weights * (x - mean_x) ** 2).sum(), (weights * (y - mean_y) ** 2).sum()
        both = (weights * (x - mean_x) * (y - mean_y)).sum()
        c1, c2 = 2.55**2, 7.65**2
        top_line = (2 * mean_x * mean_y + c1) * (2 * both + c2)
        values.append(top_line / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)))
    assert reconstruction.ssim(torch.tensor(a), torch.tensor(b)).item() == pytest.approx(np.mean(values), abs=1e-12)


def test_closed_forms():
    a = torch.full((1, 3, 16, 16), 100, dtype=torch.uint8)
    assert reconstruction.psnr(a, a + 5).item() == pytest.approx(20 * math.log10(255 / 5))
    assert reconstruction.psnr(a, a).item() == math.inf
    assert reconstruction.ssim(a, a).item() == pytest.approx(1.0)
    constant = (2 * 100 * 105 + 2.55**2) / (100**2 + 105**2 + 2.55**2)
    assert reconstruction.ssim(a, a + 5).item() == pytest.approx(constant)


def test_an_exact_image_counts_as_one_value_off_by_one():
    a = torch.randint(0, 255, (1, 3, 16, 16), dtype=torch.uint8)
    b = a.clone()
    b[0, 0, 0, 0] += 1
    assert reconstruction.score(a, a).psnr.item() == pytest.approx(reconstruction.psnr(a, b).item())


def test_too_small_for_the_window():
    with pytest.raises(ValueError, match="at least 11x11; given 10x40"):
        reconstruction.ssim(torch.zeros(1, 3, 10, 40), torch.zeros(1, 3, 10, 40))


def test_to_uint8_rounds_and_clips():
    values = torch.tensor([-2.0, -1.0, -1 + 0.4 / 127.5, -1 + 0.6 / 127.5, 0.999, 1.0, 3.0])
    assert reconstruction.to_uint8(values).tolist() == [0, 0, 0, 1, 255, 255, 255]
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(reconstruction.to_uint8(every.float() * (2 / 255) - 1), every)


def test_totals_are_means_over_images_with_intervals():
    autoencoder = Quantiser()
    result = reconstruction.evaluate_reconstruction(autoencoder, batches(10, 4))
    images = torch.cat([b.images for b in batches(10, 4)])
    restored = ((images * 8).round() / 8).clamp(-1, 1)
    a, b = (((x + 1) * 127.5).round().numpy() for x in (images, restored))
    expected = [peak_signal_noise_ratio(x, y, data_range=255) for x, y in zip(a, b, strict=True)]
    assert result["n"] == 10
    assert result["per_image"]["psnr"] == pytest.approx(expected, abs=1e-9)
    assert result["psnr"] == pytest.approx(np.mean(expected), abs=1e-9)
    for name in ("psnr", "ssim"):
        low, high = result[f"{name}_interval"]
        spread = np.std(result["per_image"][name]) / np.sqrt(10)
        assert low < result[name] < high
        assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.25)


@pytest.mark.parametrize(("limit", "n"), [(1, 1), (4, 4), (6, 6), (100, 10), (None, 10)])
def test_limit(limit, n):
    result = reconstruction.evaluate_reconstruction(Quantiser(), batches(10, 4), limit)
    assert result["n"] == n
    assert len(result["per_image"]["ssim"]) == n


def test_an_endless_stream_is_read_no_further_than_needed():
    def stream():
        yield from batches(4, 2)
        raise AssertionError("read beyond the limit")

    assert reconstruction.evaluate_reconstruction(Quantiser(), stream(), 4)["n"] == 4


def test_better_autoencoders_score_better():
    scores = [reconstruction.evaluate_reconstruction(Quantiser(x), batches(4, 4)) for x in (2.0, 8.0, 64.0)]
    for name in ("psnr", "ssim"):
        assert scores[0][name] < scores[1][name] < scores[2][name]


def test_measured_in_evaluation_mode_and_left_as_it_was():
    autoencoder = Quantiser().train()
    reconstruction.evaluate_reconstruction(autoencoder, batches(4, 2))
    assert autoencoder.modes == [False, False]
    assert autoencoder.training


def test_nothing_to_measure():
    with pytest.raises(ValueError, match="no images"):
        reconstruction.evaluate_reconstruction(Quantiser(), [])
    with pytest.raises(ValueError, match="latents only"):
        reconstruction.evaluate_reconstruction(Quantiser(), [Batch(None, ["x"], torch.zeros(1, 4, 8, 8))])
