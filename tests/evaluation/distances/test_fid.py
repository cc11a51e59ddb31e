"""FID against torch-fidelity and torchmetrics themselves, and what is no Inception."""

import hashlib
from pathlib import Path

import pytest
import torch
import torch_fidelity
from torch.utils.data import Dataset
from torchmetrics.image.fid import FrechetInceptionDistance

from sana_lab.evaluation.distances.measure import Distances
from sana_lab.evaluation.extractors.inception import WEIGHTS, hint


class Images(Dataset):
    """What torch-fidelity reads: one uint8 image (3, H, W) at a time."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]


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


@pytest.fixture
def weights(inception_weights: Path) -> Path:
    return inception_weights


def fid(real: list[torch.Tensor], fake: list[torch.Tensor], weights: Path, *, batch: int = 32, layer: str = "64"):
    """FID by the measure: (value, report)."""
    extractor = {"name": "inception", "weights": str(weights), "layer": layer, "device": "cpu"}
    measure = Distances(extractor, interval="none", batch=batch)
    for part in real:
        measure.refer(part)
    for part in fake:
        measure.add(part, [{}] * len(part))
    report = measure.report()
    return next(iter(report.values.values())).value, report


class TestFid:
    @pytest.mark.parametrize("layer", ["64", pytest.param("2048", marks=pytest.mark.slow)])
    def test_agrees_with_torch_fidelity(self, weights, layer):
        """With fewer images than features, where covariances are singular."""
        a, b = images(6, 0), images(5, 1, blur=5)
        value, report = fid([a[:4], a[4:]], [b], weights, batch=8, layer=layer)
        assert value == pytest.approx(reference(a, b, weights, layer), rel=1e-4)
        assert (report.settings["reference"]["n"], report.settings["images"]) == (6, 5)

    @pytest.mark.slow
    def test_agrees_to_a_millionth_with_more_images_than_features(self, weights):
        """With torch-fidelity, and with torchmetrics where it does not antialias either."""
        a, b = images(120, 0), images(120, 1, blur=5)
        value, _ = fid([a], [b], weights, batch=8)
        assert value == pytest.approx(reference(a, b, weights, "64"), rel=1e-6)
        peer = FrechetInceptionDistance(64, feature_extractor_weights_path=str(weights), antialias=False)
        for batch, real in ((a, True), (b, False)):
            for part in batch.split(8):
                peer.update(part, real=real)
        assert value == pytest.approx(float(peer.compute()), rel=1e-5)

    def test_says_what_it_measured_with(self, weights):
        identity = fid([images(3, 0)], [images(3, 1)], weights)[1].settings["extractor"]
        assert identity["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
        assert (identity["resize"], identity["layer"]) == ("tf1", "64")

    def test_orders_distributions(self, weights):
        real, near, far = images(8, 0), images(8, 1), images(8, 1, blur=5)
        assert fid([real], [near], weights)[0] < fid([real], [far], weights)[0]

    def test_features_do_not_depend_on_the_batch(self, weights):
        a, b = images(4, 0), images(4, 1, blur=3)
        values = [fid([a], [b], weights, batch=n)[0] for n in (3, 32)]
        assert values == pytest.approx([values[0]] * 2, rel=1e-4)

    def test_sizes_may_differ(self, weights):
        _, report = fid([images(3, 0, size=40)], [images(2, 1, size=64), images(2, 2)], weights)
        assert report.settings["images"] == 4

    @pytest.mark.parametrize(
        "wrong", [torch.zeros(3, 3, 8, 8), torch.zeros(3, 8, 8, 3, dtype=torch.uint8), torch.zeros(3, 8, 8).byte()]
    )
    def test_other_images(self, weights, wrong):
        with pytest.raises(ValueError, match=r"uint8 \(B, 3, H, W\)"):
            fid([images(3, 0)], [wrong], weights)

    def test_too_few(self, weights):
        with pytest.raises(ValueError, match="2 real images; given 1"):
            fid([images(1, 0)], [images(3, 0)], weights)


class TestWeights:
    def test_the_hint_is_one_line_with_the_file_name(self):
        assert WEIGHTS in hint()
        assert "\n" not in hint()

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
