"""The measure `distances`: every metric of an extractor in one pass, under the right names, with intervals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sana_lab.config.specs import SpecError
from sana_lab.evaluation.distances import mmd, reference
from sana_lab.evaluation.distances.frechet import frechet, frechet_rows
from sana_lab.evaluation.distances.measure import METRICS, Distances
from sana_lab.evaluation.distances.moments import moments
from sana_lab.evaluation.extractors.function import Function
from sana_lab.evaluation.extractors.inception import STAGES

ALL = tuple(m for m in METRICS if m != "inception_score")
EXTRACTOR = {"name": "function", "function": f"{__name__}:tiles"}


def tiles(pictures: torch.Tensor) -> torch.Tensor:
    """12 features of a picture: the mean of each quarter and colour."""
    return torch.nn.functional.adaptive_avg_pool2d(pictures.float() / 255, 2).flatten(1)


def images(count: int, seed: int, dark: float = 0.0) -> torch.Tensor:
    noise = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return (noise * (1 - dark) * 255).round().byte()


def measured(fake: torch.Tensor, real: torch.Tensor | None, **options) -> "tuple[Distances, object]":
    measure = Distances(**{"extractor": EXTRACTOR, "metrics": ALL, **options})
    if real is not None:
        measure.refer(real)
    for part in fake.split(33):
        measure.add(part, [{"prompt": ""}] * len(part))
    return measure, measure.report()


class TestReport:
    def test_every_metric_has_an_interval_around_it(self):
        measure, found = measured(images(90, 0, 0.1), images(70, 1))
        names = ["fd_tiles", "fd_infinity_tiles", "kd_tiles", "cmmd_tiles", "cmmd_biased_tiles"]
        assert list(found.values) == names + [f"{m}_tiles" for m in ("precision", "recall", "density", "coverage")]
        assert all(v.low <= v.value <= v.high for v in found.values.values())
        assert measure.needs_reference
        assert json.loads(json.dumps(found.settings)) == found.settings

    def test_values_are_those_of_the_functions(self):
        fake, real = images(90, 0, 0.1), images(70, 1)
        _, found = measured(fake, real)
        x, y = tiles(fake), tiles(real)
        expected = frechet(moments(x).gaussian(), moments(y).gaussian())
        assert found.values["fd_tiles"].value == pytest.approx(expected, rel=1e-9)
        assert found.values["kd_tiles"].value == mmd.discrepancy(x, y, mmd.polynomial).value
        unit = [torch.nn.functional.normalize(f) for f in (x, y)]
        expected = 1000 * mmd.discrepancy(*unit, mmd.gaussian).value
        assert found.values["cmmd_tiles"].value == pytest.approx(expected, rel=1e-5)

    def test_per_image_averages_to_the_value_and_spreads_to_its_interval(self):
        _, found = measured(images(90, 0, 0.1), images(70, 1))
        for name, each in found.per_image.items():
            assert len(each) == 90
            assert np.mean(each) == pytest.approx(found.values[name].value, abs=1e-9)
        half = 1.96 * np.std(found.per_image["fd_tiles"], ddof=1) / 90**0.5
        assert found.values["fd_tiles"].high - found.values["fd_tiles"].value == pytest.approx(half, rel=1e-3)
        assert {"fd_infinity_tiles", "kd_tiles", "precision_tiles"} <= found.per_image.keys()

    def test_batches_do_not_matter(self):
        one, two = (measured(images(40, 0), images(40, 1), batch=b)[1].values for b in (3, 64))
        for name in one:
            assert one[name] == pytest.approx(two[name], rel=1e-6, abs=1e-9)

    def test_settings_say_what_two_numbers_must_share(self):
        fake, real = images(30, 0), images(40, 1)
        found = measured(fake, real)[1].settings
        assert found["extractor"] == Function(EXTRACTOR["function"]).identity()
        assert found["reference"]["n"] == 40
        assert found["images"] == 30
        assert found["features_mib"] == pytest.approx((30 + 40) * 12 * 4 / 2**20, abs=1e-3)
        assert "jackknife" in found["intervals"]["fd_tiles"]
        assert measured(fake, real.flip(0))[1].settings == found

    @pytest.mark.parametrize("how", ["jackknife", "bootstrap"])
    def test_with_fewer_images_than_features(self, how):
        found = measured(images(10, 0, 0.2), images(60, 1), metrics=["fid"], interval=how)[1]
        expected = frechet_rows(tiles(images(10, 0, 0.2)), moments(tiles(images(60, 1))).gaussian())
        value, low, high, n = found.values["fd_tiles"]
        assert value == pytest.approx(expected)
        assert low < value < high
        assert n == 10
        assert how in found.settings["intervals"]["fd_tiles"]

    def test_without_an_interval_nothing_is_kept(self):
        found = measured(images(10, 0), images(60, 1), metrics=["fid"], interval="none")[1]
        assert found.values["fd_tiles"][1:3] == (None, None)
        assert found.settings["features_mib"] == 0
        assert found.per_image == {}


class TestReference:
    @pytest.fixture
    def file(self, tmp_path: Path) -> str:
        made = reference.compute([images(70, 1)], Function(EXTRACTOR["function"]), features=True)
        reference.save(made, tmp_path / "a.safetensors")
        return str(tmp_path / "a.safetensors")

    def test_a_file_does_what_the_images_do(self, file):
        (measure, found), (_, expected) = (
            measured(images(50, 0, 0.1), real, reference=given) for real, given in ((None, file), (images(70, 1), None))
        )
        assert not measure.needs_reference
        assert found == expected

    def test_another_extractors_file_is_refused_at_once(self, file):
        with pytest.raises(SpecError, match="of another extractor: version is '', expected '2'"):
            Distances({**EXTRACTOR, "version": "2"}, reference=file)

    def test_moments_alone_serve_only_some(self, tmp_path):
        made = reference.compute([images(70, 1)], Function(EXTRACTOR["function"]))
        reference.save(made, tmp_path / "b.safetensors")
        file = str(tmp_path / "b.safetensors")
        assert list(measured(images(30, 0), None, metrics=["fid"], reference=file)[1].values) == ["fd_tiles"]
        with pytest.raises(SpecError, match="kid, recall need the features of real images"):
            Distances(EXTRACTOR, ("fid", "kid", "recall"), reference=file)


class TestRefused:
    def test_what_is_no_metric(self):
        with pytest.raises(SpecError, match="called 'kidd'; did you mean 'kid'"):
            Distances(EXTRACTOR, ("kidd",))
        with pytest.raises(SpecError, match="no metrics"):
            Distances(EXTRACTOR, ())
        with pytest.raises(SpecError, match="'tiles' gives none; expected 'inception'"):
            Distances(EXTRACTOR, ("inception_score",))

    @pytest.mark.parametrize(("metric", "fake", "real", "told"), [
        ("fid", 1, 9, "fid needs at least 2 images; given 1"),
        ("fid", 9, 1, "fid needs at least 2 real images; given 1"),
        ("fid", 9, 0, "fid needs at least 2 real images; given 0"),
        ("fid_infinity", 19, 9, "fid_infinity needs at least 20 images; given 19"),
        ("kid", 9, 3, "kid needs at least 4 real images; given 3"),
        ("coverage", 5, 9, "coverage needs at least 6 images; given 5"),
    ])  # fmt: skip
    def test_too_few(self, metric, fake, real, told):
        with pytest.raises(ValueError, match=told):
            measured(images(fake, 0), images(real, 1), metrics=[metric])

    def test_other_images(self):
        with pytest.raises(ValueError, match="real images are"):
            Distances(EXTRACTOR).refer(images(2, 0).float())


class Small(torch.nn.Module):
    """What `Inception` reaches for in its network, with one cheap convolution for each of its layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        shapes = {"64": (3, 64, 64), "192": (64, 192, 1), "768": (192, 768, 1), "2048": (768, 2048, 1)}
        for layer, names in STAGES.items():
            into, out, stride = shapes[layer]
            self.add_module(names[0], torch.nn.Conv2d(into, out, 1, stride))
            for name in names[1:]:
                self.add_module(name, torch.nn.ReLU())
        self.fc = torch.nn.Linear(2048, 1008)


class TestInception:
    @pytest.fixture
    def spec(self, inception_weights: Path) -> dict:
        return {"name": "inception", "weights": str(inception_weights)}

    def test_the_papers_names_and_the_score_in_one_pass(self, spec):
        measure = Distances(spec, ("fid", "kid", "inception_score"))
        measure.extractor.network = Small()
        looked = []
        measure.extractor.network.Conv2d_1a_3x3.register_forward_hook(lambda *args: looked.append(len(args[2])))
        measure.refer(images(4, 1))
        measure.add(images(20, 0), [{"prompt": ""}] * 20)
        found = measure.report()
        assert list(found.values) == ["fid", "kid", "inception_score"]
        assert found.values["inception_score"].value >= 1
        assert looked == [4, 20]

    def test_another_layer_has_another_name(self, spec):
        measure = Distances({**spec, "layer": "64"}, ("fid", "recall"))
        assert [measure.column(m) for m in measure.metrics] == ["fd_inception_64", "recall_inception_64"]

    def test_the_score_alone_needs_no_reference(self, spec):
        measure = Distances(spec, ("inception_score",))
        assert not measure.needs_reference
        measure.extractor.network = Small()
        measure.add(images(20, 0), [{"prompt": ""}] * 20)
        found = measure.report()
        assert found.settings["reference"] is None
        assert len(found.per_image["inception_score"]) == 20
