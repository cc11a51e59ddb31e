"""Aspect-ratio buckets, the order of their batches, and permutations by counter."""

from collections import Counter

import numpy as np
import pytest
from scipy import stats

from sana_lab.data import buckets
from sana_lab.data.bucket_order import BucketOrder
from sana_lab.data.random_numbers import permuted, uniform


class TestShapes:
    @pytest.mark.filterwarnings("ignore")
    def test_are_those_of_the_released_models(self):
        sana = pytest.importorskip("diffusers.pipelines.sana.pipeline_sana")
        sigma = pytest.importorskip("diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma")
        for size, table in ((2048, sigma.ASPECT_RATIO_2048_BIN), (4096, sana.ASPECT_RATIO_4096_BIN)):
            assert {*buckets.shapes(size, 32)} == {(int(h), int(w)) for h, w in table.values()}
        for size, table in ((512, sigma.ASPECT_RATIO_512_BIN), (1024, sigma.ASPECT_RATIO_1024_BIN)):  # 33 of the 40
            assert {*buckets.shapes(size, 32)} > {(int(h), int(w)) for h, w in table.values()}

    @pytest.mark.parametrize("size", [512, 1024, 2048, 2880, 4096])
    def test_are_forty_of_one_area(self, size):
        shapes = buckets.shapes(size, 32)
        assert len(shapes) == 40
        assert all(0.85 < height * width / size**2 <= 1.06 for height, width in shapes)
        assert min(h / w for h, w in shapes) < 0.26
        assert max(h / w for h, w in shapes) > 3.9

    def test_small_sizes_round_to_fewer(self):
        shapes = buckets.shapes(64, 16)
        assert len(shapes) == len({*shapes}) < 40
        assert all(side % 16 == 0 for shape in shapes for side in shape)
        assert (64, 64) in shapes
        with pytest.raises(ValueError, match="size 72 is not a multiple of 16"):
            buckets.shapes(72, 16)

    def test_the_nearest_has_the_least_difference_of_ratios(self):
        shapes = buckets.shapes(512, 32)
        rng = np.random.default_rng(0)
        heights, widths = rng.integers(100, 4000, (2, 300))
        for height, width, bucket in zip(heights, widths, buckets.nearest(shapes, heights, widths), strict=True):
            differences = [abs(h / w - height / width) for h, w in shapes]
            assert differences[bucket] == min(differences)


class TestPermutation:
    @pytest.mark.parametrize("length", [1, 2, 3, 5, 17, 64, 1000, 12345])
    def test_is_one(self, length):
        assert sorted(permuted(np.arange(length), length, 3, 1)) == list(range(length))

    def test_every_permutation_is_as_likely(self):
        counts = Counter(tuple(permuted(np.arange(4), 4, 7, epoch)) for epoch in range(4800))
        assert len(counts) == 24
        assert stats.chisquare(list(counts.values())).pvalue > 1e-4

    def test_neighbours_are_apart(self):
        order = permuted(np.arange(100_000), 100_000, 0, 0)
        assert abs(stats.spearmanr(order[:-1], order[1:]).statistic) < 0.02
        assert abs(stats.spearmanr(np.arange(100_000), order).statistic) < 0.02
        assert (permuted(np.arange(100_000), 100_000, 0, 1) == order).sum() < 10

    def test_uniform_numbers(self):
        numbers = uniform(5, np.arange(20_000)[:, None], np.arange(3)).ravel()
        assert stats.kstest(numbers, "uniform").pvalue > 1e-4
        assert uniform(5, 7, 2) == uniform(5, np.arange(20), 2)[7] != uniform(6, 7, 2)


class TestOrder:
    COUNTS = (7, 1, 40, 0, 3)

    def test_no_item_is_dropped_or_repeated_within_an_epoch(self):
        order, uses = BucketOrder(self.COUNTS, 4, 5), Counter()
        for number in range(51 * 12 // 4):
            batch = order.at(number)
            assert len(batch.items) == 4
            uses.update((batch.bucket, int(i), int(e)) for i, e in zip(batch.items, batch.epochs, strict=True))
        assert max(uses.values()) == 1
        for epoch in range(10):  # later ones may be open
            assert sum(e == epoch for _, _, e in uses) == 51

    def test_batches_are_functions_of_seed_and_number(self):
        one, other = BucketOrder(self.COUNTS, 4, 5), BucketOrder(self.COUNTS, 4, 5)
        forwards = [one.at(n) for n in range(60)]
        backwards = [other.at(n) for n in reversed(range(60))][::-1]
        assert all(
            a.bucket == b.bucket and (a.items == b.items).all() for a, b in zip(forwards, backwards, strict=True)
        )
        another = [BucketOrder(self.COUNTS, 4, 6).at(n) for n in range(60)]
        assert [tuple(a.items) for a in another] != [tuple(a.items) for a in forwards]

    def test_buckets_are_shuffled_anew_in_each_epoch(self):
        order = BucketOrder((400, 400), 4, 0)
        epochs = [[order.at(n).bucket for n in range(first, first + 200)] for first in (0, 200)]
        assert epochs[0] != epochs[1]
        assert all(80 < sum(buckets[:100]) + 50 < 120 for buckets in epochs)  # about half of the first half

    def test_no_items(self):
        with pytest.raises(ValueError, match="no items"):
            BucketOrder((0, 0), 4, 0)
