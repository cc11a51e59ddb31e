"""Fréchet distances against closed forms and other libraries; their intervals against bootstraps and fresh draws."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from sana_lab.evaluation.distances.frechet import (
    bootstrap,
    frechet,
    frechet_rows,
    infinity,
    influence,
    intercept_weights,
    leave_one_out,
    low_rank,
)
from sana_lab.evaluation.distances.moments import Gaussian, Moments, moments
from sana_lab.intervals import jackknife


def rows(count: int, width: int, seed: int, spread: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    """Of one Gaussian for each (width, spread, shift), with axes of falling length, in float64."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(width).normal(size=(width, width)) / width**0.5 + np.diag(np.linspace(1, 0.2, width))
    return torch.tensor(rng.normal(size=(count, width)) @ mix * spread + shift)


def gaussian(width: int, seed: int) -> Gaussian:
    return moments(rows(4 * width, width, seed)).gaussian()


class TestMoments:
    def test_they_are_numpys(self):
        data = rows(57, 6, 0)
        found = Moments()
        for part in data.split([20, 0, 1, 36]):
            found.add(part)
        np.testing.assert_allclose(found.mean, data.numpy().mean(0), rtol=1e-12)
        np.testing.assert_allclose(found.covariance, np.cov(data.numpy(), rowvar=False), rtol=1e-12, atol=1e-12)

    def test_they_survive_a_large_offset(self):
        data = rows(50, 4, 0)
        np.testing.assert_allclose(moments(data + 1e7, 25).covariance, moments(data).covariance, rtol=1e-6)

    @pytest.mark.parametrize("cut", [0, 13, 57])
    def test_parts_merge_into_the_whole(self, cut):
        data = rows(57, 6, 0) + 100
        whole, first, second = moments(data), moments(data[:cut]), moments(data[cut:])
        first.merge(second)
        np.testing.assert_allclose(first.mean, whole.mean, rtol=1e-12)
        np.testing.assert_allclose(first.covariance, whole.covariance, rtol=1e-9, atol=1e-12)
        assert first.n == 57


class TestDistance:
    def test_independent_coordinates(self):
        a = Gaussian(torch.tensor([1.0, 1.0]).double(), torch.diag(torch.tensor([4.0, 9.0]).double()))
        b = Gaussian(torch.tensor([-2.0, -2.0]).double(), torch.diag(torch.tensor([25.0, 1.0]).double()))
        assert frechet(a, b) == pytest.approx(2 * 3**2 + (2 - 5) ** 2 + (3 - 1) ** 2, rel=1e-12)

    @pytest.mark.parametrize("width", [3, 64])
    def test_any_covariance_against_sqrtm(self, width):
        a, b = gaussian(width, 1), gaussian(width, 2)
        root = scipy.linalg.sqrtm((a.covariance @ b.covariance).numpy()).real
        expected = (a.mean - b.mean).square().sum() + (a.covariance + b.covariance).trace() - 2 * np.trace(root)
        assert frechet(a, b) == pytest.approx(float(expected), rel=1e-8)

    def test_a_scaled_and_turned_gaussian(self):
        """Covariances that commute: the distance is that of the roots."""
        a = gaussian(16, 1)
        assert frechet(a, Gaussian(a.mean + 1, 9 * a.covariance)) == pytest.approx(
            16 + 4 * float(a.covariance.trace()), rel=1e-8
        )

    def test_none_to_itself_and_no_direction(self):
        a, b = gaussian(5, 1), gaussian(5, 2)
        assert frechet(a, a) == pytest.approx(0, abs=1e-6 * float(a.covariance.trace()))
        assert frechet(a, b) == pytest.approx(frechet(b, a))

    @pytest.mark.parametrize("count", [5, 200])
    def test_torch_fidelitys_formula(self, count):
        """Also with fewer rows than features, where covariances are singular."""
        x, y = rows(count, 12, 3), rows(count, 12, 4)
        expected = fid_statistics_to_metric(*(fid_features_to_statistics(r) for r in (x, y)), False)
        assert frechet_rows(x, moments(y).gaussian()) == pytest.approx(expected["frechet_inception_distance"], rel=1e-6)

    @pytest.mark.parametrize("count", [2, 9, 32])
    def test_the_low_rank_form_is_the_same(self, count):
        x, reference = rows(count, 32, 0, 1.3), gaussian(32, 1)
        assert low_rank(x, reference) == pytest.approx(frechet(moments(x).gaussian(), reference), rel=1e-6)


class TestInfluence:
    @pytest.mark.parametrize(("count", "width"), [(40, 6), (7, 12)])
    def test_is_the_derivative_in_a_rows_weight(self, count, width):
        """By differences of the distance of weighted rows, in both forms."""
        x, reference = rows(count, width, 0, 1.2, 0.1), gaussian(width, 1)
        found, step = influence(x, reference), 1e-4
        assert float(found.mean()) == pytest.approx(0, abs=1e-12)
        for i in (0, count - 1):
            ahead, behind = (weighted(x, reference, i, h) for h in (step, -step))
            assert float(found[i]) == pytest.approx((ahead - behind) / (2 * step), rel=1e-4)

    def test_chunks_do_not_matter(self):
        x, reference = rows(30, 4, 0), gaussian(4, 1)
        torch.testing.assert_close(influence(x, reference, chunk=7), influence(x, reference))

    def test_the_jackknife_is_within_a_tenth_of_the_full_bootstrap_at_64_features(self):
        x, reference = rows(2000, 64, 0, 1.2, 0.2), moments(rows(4000, 64, 1)).gaussian()
        generator = torch.Generator().manual_seed(0)
        picks = (torch.randint(2000, (2000,), generator=generator) for _ in range(400))
        draws = np.array([frechet(moments(x[p]).gaussian(), reference) for p in picks])
        ratio = float(influence(x, reference).std()) / 2000**0.5 / draws.std()
        assert ratio == pytest.approx(1, abs=0.1)
        found = jackknife(frechet_rows(x, reference), influence(x, reference))
        low, high = np.quantile(draws, [0.025, 0.975])
        assert (found.high - found.low) / (high - low) == pytest.approx(1, abs=0.1)

    @pytest.mark.parametrize(("count", "width", "how"), [(400, 16, influence), (30, 64, leave_one_out)])
    def test_it_is_as_large_as_the_spread_of_fresh_draws(self, count, width, how):
        reference = moments(rows(4000, width, 0)).gaussian()
        draws = [rows(count, width, seed, 1.5, 0.3) for seed in range(1, 201)]
        spread = np.std([frechet_rows(x, reference) for x in draws])
        errors = [float(how(x, reference).std()) / count**0.5 for x in draws[:40]]
        assert np.mean(errors) / spread == pytest.approx(1, abs=0.15)

    def test_leaving_out_is_a_naive_loop(self):
        x, reference = rows(9, 12, 0, 1.2), gaussian(12, 1)
        without = np.array([low_rank(torch.cat([x[:i], x[i + 1 :]]), reference) for i in range(9)])
        np.testing.assert_allclose(leave_one_out(x, reference), 8 * (without.mean() - without), rtol=1e-4)


def weighted(x: torch.Tensor, reference: Gaussian, i: int, h: float) -> float:
    """The distance where the i-th row takes the share h of all weight from the others."""
    n = len(x)
    weights = torch.full((n,), (1 - h) / n, dtype=torch.float64)
    weights[i] += h
    mean = weights @ x
    away = (x - mean) * weights.sqrt()[:, None]
    return frechet(Gaussian(mean, away.T @ away * n / (n - 1)), reference)


class TestBootstrap:
    def test_its_draws_are_those_of_a_naive_loop(self):
        x, reference = rows(20, 32, 0, 1.2, 0.1), gaussian(32, 1)
        found = bootstrap(x, reference, resamples=50, seed=3)
        generator = torch.Generator().manual_seed(3)
        picks = [torch.randint(20, (20,), generator=generator) for _ in range(50)]
        draws = [frechet_rows(x[pick], reference) for pick in picks]
        low, high = np.quantile(np.array(draws) - np.mean(draws), [0.025, 0.975])
        value = low_rank(x, reference)
        assert found[:3] == pytest.approx((value, value + low, value + high), rel=1e-5)

    def test_it_is_at_least_as_wide_as_the_spread_of_fresh_draws(self):
        reference = moments(rows(4000, 64, 0)).gaussian()
        draws = [rows(40, 64, seed, 1.3, 0.1) for seed in range(1, 101)]
        spread = np.std([low_rank(x, reference) for x in draws])
        found = bootstrap(draws[0], reference, resamples=100)
        assert 1 < (found.high - found.low) / (2 * 1.96 * spread) < 4


class TestInfinity:
    def test_the_weights_are_those_of_least_squares(self):
        x, y = np.array([0.1, 0.2, 0.5, 0.7]), np.array([3.0, 1.0, 4.0, 1.5])
        assert intercept_weights(x) @ y == pytest.approx(np.polyfit(x, y, 1)[1])

    def test_it_is_near_nothing_for_the_same_distribution_where_the_raw_distance_is_not(self):
        reference = moments(rows(20_000, 16, 0)).gaussian()
        draws = [rows(400, 16, seed) for seed in range(1, 21)]
        raw = np.mean([frechet_rows(x, reference) for x in draws])
        found = np.mean([infinity(x, reference, influence(x, reference))[0] for x in draws])
        assert abs(found) < raw / 5

    def test_its_mean_is_the_true_distance_and_its_error_the_spread(self):
        truth = moments(rows(200_000, 8, 0)).gaussian()
        expected = frechet(moments(rows(200_000, 8, 1, 1.3, 0.1)).gaussian(), truth)
        found, errors = [], []
        for seed in range(2, 102):
            x = rows(300, 8, seed, 1.3, 0.1)
            value, moved = infinity(x, truth, influence(x, truth), seed=seed)
            found.append(value)
            errors.append(float(moved.std()) / 300**0.5)
        assert np.mean(found) == pytest.approx(expected, abs=3 * np.std(found) / 10)
        assert np.mean(errors) / np.std(found) == pytest.approx(1, abs=0.2)

    def test_the_seed_decides(self):
        x, reference = rows(60, 4, 0), gaussian(4, 1)
        moves = influence(x, reference)
        assert infinity(x, reference, moves, seed=1)[0] == infinity(x, reference, moves, seed=1)[0]
        assert infinity(x, reference, moves, seed=1)[0] != infinity(x, reference, moves, seed=2)[0]

    def test_too_few(self):
        with pytest.raises(ValueError, match="at least 20 images; given 19"):
            infinity(rows(19, 2, 0), gaussian(2, 1), torch.zeros(19))
