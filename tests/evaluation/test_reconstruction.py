"""PSNR and SSIM against their definitions, scikit-image and torchmetrics."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn
from torchmetrics.functional.image import structural_similarity_index_measure

from sana_lab.evaluation import Extractor, reconstruction
from sana_lab.evaluation.command import lines
from sana_lab.evaluation.reconstruction import GAP, TEXT_HEIGHT, Case, Options, evaluate_folder
from sana_lab.models.autoencoders import Autoencoder, losses
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


class Blocks(Quantiser):
    """The same, but it takes multiples of 8 pixels only, and keeps the size of what it was given."""

    def __init__(self, levels: float = 8.0) -> None:
        super().__init__(levels)
        self.downsample = 8
        self.sizes: list[tuple[int, ...]] = []

    def posterior(self, images):
        self.sizes.append(tuple(images.shape))
        return super().posterior(images)


class Means(Extractor):
    """The mean of each colour in each quarter of the image."""

    dim = 12

    def features(self, images):
        return nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)

    def identity(self):
        return {"extractor": "means", "resize": "none"}


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
    assert reconstruction.finite_psnr(a, a).item() == pytest.approx(reconstruction.psnr(a, b).item())


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


# --- folders of any size, more measures, worst cases


def photographs(folder: Path, sizes: list[tuple[int, int]], noise: float = 40.0) -> list[np.ndarray]:
    """PNGs a.png, b.png ... of these (height, width); smooth, with noise that no two share."""
    folder.mkdir(exist_ok=True)
    images = [pairs(noise, size, k + 1)[1][k].permute(1, 2, 0).numpy() for k, size in enumerate(sizes)]
    for k, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{chr(97 + k)}.png")
    return images


def test_a_folder_of_mixed_sizes_is_scored_on_its_own_pixels(tmp_path: Path):
    sizes = [(16, 24), (16, 24), (16, 24), (21, 30), (16, 24)]
    images = photographs(tmp_path, sizes)
    autoencoder = Blocks()
    found = evaluate_folder(autoencoder, tmp_path, batch=2)
    assert autoencoder.sizes == [(2, 3, 16, 24), (1, 3, 16, 24), (1, 3, 24, 32), (1, 3, 16, 24)]
    assert found["names"] == ["a.png", "b.png", "c.png", "d.png", "e.png"]
    assert (found["n"], found["skipped"]) == (5, {})
    assert "up to a multiple of 8" in found["settings"]["padding"]
    for k, image in enumerate(images):
        given = torch.from_numpy(image).float() / 127.5 - 1
        restored = reconstruction.to_uint8((given * 8).round() / 8).numpy()
        expected = peak_signal_noise_ratio(image, restored, data_range=255)
        assert found["per_image"]["psnr"][k] == pytest.approx(expected, abs=1e-9)


def test_padding_repeats_the_edge_and_leaves_multiples_alone():
    images = torch.arange(6.0).view(1, 1, 2, 3)
    expected = torch.tensor([[0.0, 1, 2, 2], [3, 4, 5, 5], [3, 4, 5, 5], [3, 4, 5, 5]])
    assert torch.equal(reconstruction.pad(images, 4)[0, 0], expected)
    assert torch.equal(reconstruction.pad(images[..., :2], 2), images[..., :2])


def test_a_folders_results_do_not_depend_on_the_batch(tmp_path: Path):
    photographs(tmp_path, [(16, 16)] * 5)
    options = Options(extractor=Means(), worst=2)
    one, many = (evaluate_folder(Blocks(), tmp_path, options=options, batch=b) for b in (1, 4))
    for name in ("psnr", "ssim", "rfid"):
        assert one["per_image"][name] == pytest.approx(many["per_image"][name], abs=1e-9)
    assert one["worst"] == many["worst"]


def test_large_images_of_a_folder_are_reconstructed_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    photographs(tmp_path, [(16, 16)] * 5)
    sizes: list[int] = []
    encode = Blocks.encode
    monkeypatch.setattr(Blocks, "encode", lambda self, x: (sizes.append(len(x)), encode(self, x))[1])
    whole = evaluate_folder(Blocks(), tmp_path)
    monkeypatch.setattr(reconstruction, "PIXELS", 600)
    parts = evaluate_folder(Blocks(), tmp_path)
    assert sizes == [5, 2, 2, 1]
    assert parts["per_image"] == whole["per_image"]
    assert parts["names"] == whole["names"]


def test_files_that_cannot_be_measured_are_named_and_counted(tmp_path: Path):
    photographs(tmp_path, [(16, 16)] * 3 + [(16, 9)])
    (tmp_path / "e.jpg").write_bytes(b"not a picture")
    (tmp_path / "notes.txt").write_text("no image file, so nobody asks")
    found = evaluate_folder(Blocks(), tmp_path, tolerated=0.4)
    assert found["n"] == 3
    assert found["skipped"]["d.png"] == "9x16, below the 11 pixels a side needed"
    assert found["skipped"]["e.jpg"] == "not an image that Pillow knows"
    with pytest.raises(ValueError, match=r"2 of 5 files, more than 30%.*'d.png' .*'e.jpg'"):
        evaluate_folder(Blocks(), tmp_path, tolerated=0.3)


def test_folders_without_images(tmp_path: Path):
    with pytest.raises(ValueError, match="holds no image files"):
        evaluate_folder(Blocks(), tmp_path)
    with pytest.raises(ValueError, match="is no folder"):
        evaluate_folder(Blocks(), tmp_path / "elsewhere")


def test_rfid_is_the_distance_of_gaussians(tmp_path: Path):
    """Against scipy's matrix square root, and the same in both directions."""
    images = torch.randn(60, 5, dtype=torch.float64)
    others = images @ torch.randn(5, 5, dtype=torch.float64) + 0.3
    estimate, each = reconstruction.rfid(images, others)
    a, b = (np.cov(x.numpy(), rowvar=False) for x in (images, others))
    apart = ((images.mean(0) - others.mean(0)) ** 2).sum().item()
    expected = apart + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert estimate.value == pytest.approx(expected, rel=1e-8)
    assert reconstruction.rfid(others, images)[0].value == pytest.approx(expected, rel=1e-8)
    assert np.mean(each) == pytest.approx(expected)
    assert estimate.low < expected < estimate.high


def test_rfids_interval_is_that_of_drawing_pairs_again():
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(400, 4, generator=generator, dtype=torch.float64)
    others = images * 1.5 + 0.2 * torch.randn(400, 4, generator=generator, dtype=torch.float64) + 0.1
    estimate, _ = reconstruction.rfid(images, others)
    picks = [torch.randint(400, (400,), generator=generator) for _ in range(200)]
    draws = [reconstruction.rfid(images[p], others[p])[0].value for p in picks]
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * np.std(draws), rel=0.2)


def test_the_whole_suite_on_a_folder(tmp_path: Path):
    photographs(tmp_path, [(32, 40)] * 6)
    torch.save({f"features.{k}": v for k, v in alexnet().state_dict().items()}, tmp_path / "alexnet.pth")
    lpips = losses.Lpips(tmp_path / "alexnet.pth", "alex")
    options = Options(lpips, Means(), 2, tmp_path / "worst" / "cases.png")
    rough, fine = (evaluate_folder(Blocks(levels), tmp_path, options=options) for levels in (2.0, 16.0))
    assert fine["psnr"] > rough["psnr"]
    for name in ("lpips", "rfid"):
        assert fine[name] < rough[name]
        low, high = rough[f"{name}_interval"]
        assert low < rough[name] < high
        assert len(rough["per_image"][name]) == 6
        assert np.mean(rough["per_image"][name]) == pytest.approx(rough[name])
    settings = rough["settings"]
    assert settings["lpips"]["net"] == "alex"
    assert len(settings["lpips"]["weights_sha256"]) == 64
    assert settings["rfid"]["extractor"] == "means"
    assert settings["rfid"]["features_kept_mib"] == pytest.approx(2 * 6 * 12 * 4 / 2**20)
    assert [line.split()[0] for line in lines({"reconstruction": rough})] == ["PSNR", "SSIM", "LPIPS", "rFID"]


def alexnet() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(layer for stage in losses.alex_stages() for layer in stage))


def test_lpips_on_images_that_are_too_small_for_it(tmp_path: Path):
    photographs(tmp_path, [(30, 40)])
    torch.save({f"features.{k}": v for k, v in alexnet().state_dict().items()}, tmp_path / "alexnet.pth")
    with pytest.raises(ValueError, match="40x30, below the 31 pixels"):
        evaluate_folder(Blocks(), tmp_path, options=Options(losses.Lpips(tmp_path / "alexnet.pth", "alex")))


def test_the_worst_cases_are_drawn_with_their_names(tmp_path: Path):
    images = photographs(tmp_path, [(16, 24), (40, 20), (16, 24)])
    found = evaluate_folder(Blocks(4.0), tmp_path, options=Options(worst=2, picture=tmp_path / "worst.png"))
    order = np.argsort(found["per_image"]["psnr"])
    assert [case["name"] for case in found["worst"]] == [found["names"][k] for k in order[:2]]
    assert [case["psnr"] for case in found["worst"]] == sorted(found["per_image"]["psnr"])[:2]
    sheet = np.asarray(Image.open(tmp_path / "worst.png"))
    first = images[order[0]]
    height, width, _ = first.shape
    views = [sheet[GAP : GAP + height, left : left + width] for left in GAP + (GAP + width) * np.arange(3)]
    assert np.array_equal(views[0], first)
    assert peak_signal_noise_ratio(first, views[1], data_range=255) == pytest.approx(found["worst"][0]["psnr"])
    assert np.array_equal(views[2], np.clip(4 * np.abs(first.astype(int) - views[1]), 0, 255))
    assert (sheet[height + 2 * GAP : height + 2 * GAP + TEXT_HEIGHT, :100] < 128).any()  # the name


def test_large_cases_are_scaled_down_and_strange_names_are_written():
    image = torch.zeros(3, 600, 1500, dtype=torch.uint8)
    case = Case(12.3, "folder/見る é.png", image, image + 90)
    assert reconstruction.render_case(case).width == 3 * (512 + GAP) + GAP
    assert "folder/?? é.png   12.30 dB" in reconstruction.caption(case)
    assert reconstruction.difference(image, image + 90).max() == 255


def test_many_images_have_a_normal_interval():
    values = np.random.default_rng(0).normal(30, 4, 6000).tolist()
    found, drawn = reconstruction._mean(values), reconstruction._mean(values[:5000])
    assert found.value == pytest.approx(np.mean(values))
    assert found.high - found.low == pytest.approx(2 * 1.96 * 4 / 6000**0.5, rel=0.05)
    assert drawn.high - drawn.low == pytest.approx(2 * 1.96 * 4 / 5000**0.5, rel=0.1)


def test_half_precision_autoencoders_are_measured_in_theirs():
    autoencoder = Quantiser().to(torch.bfloat16)
    assert reconstruction.evaluate_reconstruction(autoencoder, batches(4, 2))["settings"]["dtype"] == "bfloat16"


def test_two_images_at_least_for_rfid():
    with pytest.raises(ValueError, match="at least two images; given 1"):
        reconstruction.evaluate_reconstruction(Quantiser(), batches(1, 1), options=Options(extractor=Means()))
