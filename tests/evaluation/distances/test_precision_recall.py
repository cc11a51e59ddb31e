"""Precision, recall, density and coverage against sklearn's neighbours and torch-fidelity."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch_fidelity.metric_prc import calculate_precision_recall_full

from sana_lab.evaluation.distances.inception_score import inception_score
from sana_lab.evaluation.distances.precision_recall import coverage, density, precision, radii


def rows(count: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(seed).normal(shift, 1, size=(count, 3)))


def test_radii_are_sklearns():
    x = rows(50, 0)
    expected = NearestNeighbors(n_neighbors=4).fit(x).kneighbors(x)[0][:, -1]
    np.testing.assert_allclose(radii(x, 3), expected, rtol=1e-6)


def test_precision_and_recall_are_torch_fidelitys():
    fake, real = rows(60, 0, 0.8), rows(80, 1)
    expected = calculate_precision_recall_full(fake, real, 3)
    found = float(precision(fake, real).mean()), float(precision(real, fake).mean())
    assert found == pytest.approx(expected)
    assert 0 < min(found) < max(found) < 1


def test_density_and_coverage_are_naive_loops():
    fake, real = rows(60, 0, 0.8).numpy(), rows(40, 1).numpy()
    reach = [sorted(np.linalg.norm(real - r, axis=1))[5] for r in real]
    within = np.array([[np.linalg.norm(f - r) <= d for r, d in zip(real, reach, strict=True)] for f in fake])
    found = density(torch.tensor(fake), torch.tensor(real)), coverage(torch.tensor(fake), torch.tensor(real))
    np.testing.assert_allclose(found[0], within.sum(1) / 5)
    np.testing.assert_array_equal(found[1], within.any(0))


def test_density_is_about_one_for_the_same_distribution():
    assert float(density(rows(500, 0), rows(500, 1)).mean()) == pytest.approx(1, abs=0.1)


def test_dropped_modes_cost_recall_and_coverage_alone():
    real = torch.cat([rows(100, 0, 0), rows(100, 1, 20)])
    fake = rows(200, 2, 0)
    assert float(precision(fake, real).mean()) > 0.8
    assert float(precision(real, fake).mean()) < 0.55
    assert float(coverage(fake, real).mean()) < 0.55


def test_too_few():
    with pytest.raises(ValueError, match="at least 4 images; given 3"):
        radii(rows(3, 0), 3)


class TestInceptionScore:
    def test_one_part_is_torch_fidelitys(self):
        from torch_fidelity.metric_isc import isc_features_to_metric

        logits = 2 * torch.tensor(np.random.default_rng(0).normal(size=(40, 10)))
        expected = isc_features_to_metric(logits, splits=1)["inception_score_mean"]
        assert inception_score(logits, splits=1)[0] == pytest.approx(expected, rel=1e-9)

    def test_parts_are_averaged(self):
        logits = torch.tensor(np.random.default_rng(0).normal(size=(23, 5)))
        order = torch.randperm(23, generator=torch.Generator().manual_seed(7))
        expected = np.mean([inception_score(logits[part], splits=1)[0] for part in order.tensor_split(3)])
        assert inception_score(logits, splits=3, seed=7)[0] == pytest.approx(expected)

    def test_sure_and_varied_pictures_score_the_number_of_classes(self):
        logits = 100 * torch.eye(4).repeat(10, 1)
        assert inception_score(logits, splits=1)[0] == pytest.approx(4)
        assert inception_score(torch.zeros(40, 4))[0] == pytest.approx(1)

    @pytest.mark.parametrize("splits", [1, 5])
    def test_influences_give_the_spread_of_fresh_draws(self, splits):
        draws = [2 * torch.tensor(np.random.default_rng(s).normal(size=(500, 6))) for s in range(200)]
        found = [inception_score(logits, splits=splits) for logits in draws]
        errors = [float(moved.std()) / 500**0.5 for _, moved in found]
        assert np.mean(errors) / np.std([value for value, _ in found]) == pytest.approx(1, abs=0.15)
        assert float(found[0][1].mean()) == pytest.approx(0, abs=1e-9)

    def test_too_few(self):
        with pytest.raises(ValueError, match="at least 20 images; given 19"):
            inception_score(torch.zeros(19, 3))
