"""Passes that metrics share give what each metric gives alone, over several blocks and uneven ones."""

import pytest
import torch

from sana_lab.evaluation.distances.mmd import discrepancy, polynomial
from sana_lab.evaluation.distances.pairs import BLOCK, Block, Reduction, reduce_pairs
from sana_lab.evaluation.distances.precision_recall import coverage, density, precision
from sana_lab.evaluation.distances.shared_pairs import SharedPairs

ALL = ("kid", "precision", "recall", "density", "coverage")


def rows(n: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def shared(fake: torch.Tensor, real: torch.Tensor, *metrics: str, same: bool = False) -> dict[str, torch.Tensor]:
    pairs = SharedPairs(fake, real, metrics, same=same)
    found = {}
    if "kid" in metrics:
        found["kid"] = torch.tensor(pairs.kid()[:3])
    if "precision" in metrics:
        found["precision"] = pairs.around_real[3].balls > 0
    if "recall" in metrics:
        found["recall"] = pairs.around_fake[3].balls > 0
    if "density" in metrics:
        found["density"] = pairs.around_real[5].balls.double() / 5
    if "coverage" in metrics:
        found["coverage"] = pairs.around_real[5].points > 0
    return found


@pytest.mark.parametrize("metrics", [ALL, *((name,) for name in ALL)])
def test_each_metric_is_itself_alone(metrics: tuple[str, ...]):
    fake, real = rows(2 * BLOCK + 70, 0, 0.4), rows(BLOCK + 9, 1)
    alone = {
        "kid": torch.tensor(discrepancy(fake, real, polynomial)[:3]),
        "precision": precision(fake, real),
        "recall": precision(real, fake),
        "density": density(fake, real),
        "coverage": coverage(fake, real),
    }
    found = shared(fake, real, *metrics)
    assert found.keys() == set(metrics)
    for name, values in found.items():
        torch.testing.assert_close(values.double(), alone[name].double(), rtol=1e-9, atol=1e-12)


def test_neighbours_and_membership_are_those_of_all_distances():
    fake, real = rows(BLOCK + 30, 0, 0.4), rows(2 * BLOCK + 5, 1)
    reach = torch.cdist(real, real, compute_mode="donot_use_mm_for_euclid_dist").sort(1).values
    apart = torch.cdist(fake, real, compute_mode="donot_use_mm_for_euclid_dist")
    found = shared(fake, real, "precision", "density", "coverage")
    assert torch.equal(found["precision"], (apart <= reach[:, 3]).any(1))
    torch.testing.assert_close(found["density"].double(), (apart <= reach[:, 5]).sum(1) / 5.0, check_dtype=False)
    assert torch.equal(found["coverage"], (apart <= reach[:, 5]).any(0))


def test_a_set_is_in_its_own_balls_in_float32_far_from_the_origin():
    """Rounding does not push rows out of balls whose edge they are: repeated rows have balls of radius 0."""
    real = (rows(BLOCK + 40, 0, 50.0)).float().repeat_interleave(4, 0)
    found = shared(real, real.flip(0), "precision", "recall", "coverage", "kid", same=True)
    assert all(found[name].all() for name in ("precision", "recall", "coverage"))
    assert found["kid"][0] == 0


def test_every_pair_comes_once_and_memory_is_a_blocks():
    class Count(Reduction):
        def begin(self, n: int, m: int, device: torch.device) -> None:
            self.pairs = torch.zeros(n, m, dtype=torch.long)
            self.largest = 0

        def add(self, block: Block) -> None:
            self.pairs[block.rows, block.columns] += 1
            if block.mirrored:
                self.pairs[block.columns, block.rows] += 1
            self.largest = max(self.largest, block.products.numel())

    for other in (None, rows(2 * BLOCK + 1, 1)):
        count = Count()
        reduce_pairs(rows(BLOCK * 2 + 3, 0), other, [count])
        assert (count.pairs == 1).all()
        assert count.largest == BLOCK**2
