"""FID against torch-fidelity itself, and Fréchet's distance against closed forms."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from sana_lab.evaluation.fidelity import WEIGHTS, Moments, fid, fid_hint, frechet, inception


class Images(Dataset):
    """What torch-fidelity reads: one uint8 image (3, H, W) at a time."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]


class Drawn(FeatureExtractorInceptionV3):
    """Random weights, drawn where a file's would be loaded; PyTorch's default leaves the features without spread."""

    def load_state_dict(self, *args):
        for module in self.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A random Inception in the format of the released file, 95 MB, away when the tests have run."""
    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "empty.pth")
    torch.manual_seed(0)
    network = Drawn("drawn", ["2048"], feature_extractor_weights_path=str(folder / "empty.pth"))
    torch.save(network.state_dict(), folder / WEIGHTS)
    yield folder / WEIGHTS
    (folder / WEIGHTS).unlink()


def images(count: int, seed: int, blur: int = 1, size: int = 40) -> torch.Tensor:
    """uint8 (count, 3, size, size); a larger `blur` makes another distribution."""
    noise = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.avg_pool2d(noise, blur, 1, blur // 2)
    return (smooth * 255).round().byte()


def reference(a: torch.Tensor, b: torch.Tensor, weights: Path, layer: str) -> float:
    settings = {"cuda": False, "cache": False, "verbose": False, "save_cpu_ram": True, "batch_size": 8, "fid": True}
    extractor = {"feature_extractor_weights_path": str(weights), "feature_layer_fid": layer}
    return torch_fidelity.calculate_metrics(input1=Images(a), input2=Images(b), **settings, **extractor)[
        "frechet_inception_distance"
    ]


def moments(rows: torch.Tensor, *sizes: int) -> Moments:
    found = Moments()
    for part in rows.split(list(sizes) or len(rows)):
        found.add(part)
    return found


def gaussian(count: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) @ mix + torch.randn(
        width, generator=generator
    )


class TestFrechet:
    def test_moments_are_numpys(self):
        rows = gaussian(57, 6, 0)
        found = moments(rows, 20, 1, 36)
        np.testing.assert_allclose(found.mean, rows.numpy().mean(0), rtol=1e-12)
        np.testing.assert_allclose(found.covariance, np.cov(rows.numpy(), rowvar=False), rtol=1e-12, atol=1e-12)

    def test_moments_survive_a_large_offset(self):
        rows = gaussian(50, 4, 0)
        np.testing.assert_allclose(moments(rows + 1e7, 25, 25).covariance, moments(rows).covariance, rtol=1e-6)

    def test_diagonal_closed_form(self):
        """Independent coordinates: the sum of squared differences of means and of deviations."""
        signs = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
        a, b = moments(signs * torch.tensor([2, 3]) + 1), moments(signs * torch.tensor([5, 1]) - 2)
        expected = 2 * 3**2 + 4 / 3 * ((2 - 5) ** 2 + (3 - 1) ** 2)
        assert frechet(a, b) == pytest.approx(expected)

    def test_a_set_is_at_no_distance_from_itself_and_distance_has_no_direction(self):
        a, b = moments(gaussian(40, 5, 1)), moments(gaussian(60, 5, 2))
        assert frechet(a, a) == pytest.approx(0, abs=1e-6 * float(a.covariance.trace()))
        assert frechet(a, b) == pytest.approx(frechet(b, a))

    @pytest.mark.parametrize("count", [5, 200])
    def test_agrees_with_torch_fidelitys_formula(self, count):
        """Also with fewer rows than features, where covariances are singular."""
        from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

        rows = [gaussian(count, 12, seed) for seed in (3, 4)]
        statistics = [fid_features_to_statistics(r) for r in rows]
        expected = fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
        assert frechet(*map(moments, rows)) == pytest.approx(expected, rel=1e-6)


class TestFid:
    @pytest.mark.parametrize("layer", ["64", pytest.param("2048", marks=pytest.mark.slow)])
    def test_agrees_with_torch_fidelity(self, weights, layer):
        a, b = images(6, 0), images(5, 1, blur=5)
        found = fid([a[:4], a[4:]], [b], weights, batch=8, layer=layer)
        assert found["value"] == pytest.approx(reference(a, b, weights, layer), rel=1e-4)
        assert (found["n_real"], found["n_fake"]) == (6, 5)

    def test_says_what_it_measured_with(self, weights):
        found = fid([images(3, 0)], [images(3, 1)], weights, layer="64")
        assert found["extractor_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
        assert "299" in found["resize"]
        assert found["layer"] == "64"

    def test_orders_distributions(self, weights):
        real, near, far = images(8, 0), images(8, 1), images(8, 1, blur=5)
        scores = [fid([real], [x], weights, layer="64")["value"] for x in (near, far)]
        assert scores[0] < scores[1]

    def test_features_do_not_depend_on_the_batch(self, weights):
        a, b = images(4, 0), images(4, 1, blur=3)
        values = [fid([a], [b], weights, batch=n, layer="64")["value"] for n in (3, 32)]
        assert values == pytest.approx([values[0]] * 2, rel=1e-4)

    def test_sizes_may_differ(self, weights):
        assert fid([images(3, 0, size=40)], [images(2, 1, size=64), images(2, 2)], weights, layer="64")["n_fake"] == 4

    def test_features_are_two_thousand_wide(self, weights):
        assert inception(weights)(images(2, 0)).shape == (2, 2048)

    @pytest.mark.parametrize(
        "wrong", [torch.zeros(3, 3, 8, 8), torch.zeros(3, 8, 8, 3, dtype=torch.uint8), torch.zeros(3, 8, 8).byte()]
    )
    def test_other_images(self, weights, wrong):
        with pytest.raises(ValueError, match=r"fake images are .*expected uint8 \(B, 3, H, W\)"):
            fid([images(3, 0)], [wrong], weights, layer="64")

    def test_too_few(self, weights):
        with pytest.raises(ValueError, match="two real images; given 1"):
            fid([images(1, 0)], [images(3, 0)], weights, layer="64")


class TestWeights:
    def test_the_hint_is_one_line_with_the_file_name(self):
        assert WEIGHTS in fid_hint()
        assert "\n" not in fid_hint()

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=f"nowhere.pth.*{WEIGHTS}"):
            fid([], [], tmp_path / "nowhere.pth")

    def test_no_weights_at_all(self, tmp_path):
        (tmp_path / "a.pth").write_text("<html>404</html>")
        with pytest.raises(ValueError, match=f"no file of weights.*{WEIGHTS}"):
            fid([], [], tmp_path / "a.pth")

    def test_code_in_the_file_is_not_run(self, tmp_path):
        class Trap:
            def __reduce__(self):
                return Path.touch, (tmp_path / "sprung",)

        torch.save({"fc.weight": Trap()}, tmp_path / "a.pth")
        with pytest.raises(ValueError, match="no file of weights"):
            fid([], [], tmp_path / "a.pth")
        assert not (tmp_path / "sprung").exists()

    def test_weights_of_another_network(self, tmp_path):
        torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "a.pth")
        with pytest.raises(ValueError, match="another network"):
            fid([], [], tmp_path / "a.pth")
