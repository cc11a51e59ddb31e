"""KID and CMMD against torch-fidelity's formula and naive loops; their errors against fresh draws."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_kid import kernel_poly, kernel_rbf, mmd2

from sana_lab.evaluation.distances.mmd import discrepancy, gaussian, polynomial


def rows(count: int, seed: int, width: int = 8, shift: float = 0.0) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(seed).normal(shift, 1, size=(count, width)))


def unit(count: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.nn.functional.normalize(rows(count, seed, shift=shift))


@pytest.mark.parametrize("estimate", ["unbiased", "biased"])
def test_kid_is_torch_fidelitys(estimate):
    x, y = rows(30, 0), rows(30, 1, shift=0.3)
    options = {"kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1}
    kernels = [kernel_poly(a.numpy(), b.numpy(), **options) for a, b in ((x, x), (x, y), (y, y))]
    expected = mmd2(*kernels, mmd_est=estimate)
    assert discrepancy(x, y, polynomial, biased=estimate == "biased").value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("estimate", ["unbiased", "biased"])
def test_cmmd_is_torch_fidelitys_with_its_kernel(estimate):
    x, y = unit(30, 0), unit(30, 1, shift=0.3)
    kernels = [kernel_rbf(a.numpy(), b.numpy(), kid_kernel_rbf_sigma=10) for a, b in ((x, x), (x, y), (y, y))]
    expected = mmd2(*kernels, mmd_est=estimate)
    assert discrepancy(x, y, gaussian, biased=estimate == "biased").value == pytest.approx(expected, rel=1e-7)


def test_unequal_sides_are_a_naive_loop():
    x, y = rows(7, 0, 3), rows(11, 1, 3)

    def k(a, b):
        return (float(a @ b) / 3 + 1) ** 3

    own = np.mean([k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    other = np.mean([k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    across = np.mean([k(a, b) for a in x for b in y])
    assert discrepancy(x, y, polynomial).value == pytest.approx(own + other - 2 * across, rel=1e-9)


def test_blocks_do_not_matter():
    x, y = rows(1030, 0, 2), rows(5, 1, 2)
    order = torch.randperm(1030, generator=torch.Generator().manual_seed(0))
    one, two = discrepancy(x, y, polynomial), discrepancy(x[order], y, polynomial)
    assert one[:3] == pytest.approx(two[:3])
    torch.testing.assert_close(one.influences[order], two.influences)


@pytest.mark.parametrize(("draw", "kernel"), [(rows, polynomial), (unit, gaussian)])
def test_z_is_standard_where_both_distributions_are_the_same(draw, kernel):
    """Over 200 draws, sides unequal: its mean is within 0.2 of 0 and its deviation between 0.85 and 1.15."""
    found = [discrepancy(draw(120, 2 * s), draw(90, 2 * s + 1), kernel) for s in range(200)]
    z = np.array([f.z for f in found])
    assert abs(z.mean()) < 0.2
    assert 0.85 < z.std() < 1.15
    assert np.mean([f.error**2 for f in found]) ** 0.5 / np.std([f.value for f in found]) == pytest.approx(1, abs=0.15)


def test_the_error_is_the_spread_where_they_differ():
    found = [discrepancy(rows(120, 2 * s, shift=0.3), rows(90, 2 * s + 1), polynomial) for s in range(200)]
    spread = np.std([f.value for f in found])
    assert np.mean([f.error for f in found]) / spread == pytest.approx(1, abs=0.15)


def test_influences_give_the_spread_with_the_reference_held():
    reference = rows(200, 1)
    found = [discrepancy(rows(200, s, shift=0.4), reference, polynomial) for s in range(2, 152)]
    errors = [float(f.influences.std()) / 200**0.5 for f in found]
    assert np.mean(errors) / np.std([f.value for f in found]) == pytest.approx(1, abs=0.2)
    assert float(found[0].influences.mean()) == pytest.approx(0, abs=1e-9)


def test_the_biased_form_of_the_same_distribution_is_above_nothing_and_falls_with_n():
    found = [discrepancy(unit(n, 0), unit(n, 1), gaussian, biased=True).value for n in (20, 400)]
    assert found[0] > 5 * found[1] > 0


def test_float32_features_lose_little():
    x, y = unit(300, 0, 0.2), unit(300, 1)
    for kernel in (polynomial, gaussian):
        exact, short = discrepancy(x, y, kernel).value, discrepancy(x.float(), y.float(), kernel).value
        assert short == pytest.approx(exact, rel=1e-3)


def test_too_few():
    with pytest.raises(ValueError, match="at least 4 images on a side; given 3 and 9"):
        discrepancy(rows(3, 0), rows(9, 1), polynomial)
