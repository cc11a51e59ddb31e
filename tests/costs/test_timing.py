"""Timings of calls whose length is known, memory of allocations whose size is known."""

import gc
import time
from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import nn

from sana_lab.costs.live_memory import peak_memory
from sana_lab.costs.timing import (
    Comparison,
    Energy,
    Percentile,
    Samples,
    Timing,
    clock_for,
    collect_samples,
    cuda_clock,
    energy_per_call,
    host_clock,
    interleave,
    median_interval,
    quantile,
    samples_needed,
)
from sana_lab.intervals import quantile_interval

MIB = 2**20


def block(mib: int) -> torch.Tensor:
    return torch.zeros(mib * MIB, dtype=torch.uint8)


def spin(seconds: float) -> None:
    """Busy, because a sleep ends when the scheduler likes."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_measure_finds_a_known_duration():
    timing = interleave({"": lambda: spin(0.004)}, warmup=1, repeats=7, device="cpu")[""]
    assert timing.n == 7
    assert timing.device_s is None
    assert 0.004 <= timing.min_s <= timing.low_s <= timing.median_s <= timing.p90_s
    assert timing.median_s <= timing.high_s


def test_warm_up_is_not_counted():
    durations = iter([0.2, 0.0, 0.0, 0.0])
    assert interleave({"": lambda: spin(next(durations))}, warmup=1, repeats=3, device="cpu")[""].p90_s < 0.1


def test_calls_take_turns():
    seen = []
    interleave({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, warmup=1, repeats=2, device="cpu")
    assert seen == list("ababab")


@pytest.mark.parametrize(("warmup", "repeats"), [(-1, 3), (0, 0)])
def test_counts_that_cannot_be(warmup: int, repeats: int):
    with pytest.raises(ValueError, match="expected at least"):
        interleave({"": lambda: None}, warmup, repeats, "cpu")


def test_summary_of_known_samples():
    values = [float(v) for v in range(11, 0, -1)]
    timing = Timing.of(values)
    assert timing.median_s == 6
    assert timing.p90_s == 10
    assert timing.iqr_s == 5
    assert timing.min_s == 1
    with pytest.raises(ValueError, match="at least one"):
        Timing.of([])


@pytest.mark.parametrize("q", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("n", [1, 2, 7, 20])
def test_quantile_is_numpys(q: float, n: int):
    values = np.random.default_rng(n).normal(size=n)
    assert quantile(values.tolist(), q) == pytest.approx(np.quantile(values, q))


@pytest.mark.parametrize("n", [6, 7, 9, 12, 15])
def test_median_interval_covers_by_enumeration(n: int):
    """Over all 2^n ways in which samples fall below or above the median, and it is the narrowest that covers."""
    low, high = median_interval(list(range(n)))
    below = [sum(signs) for signs in product((0, 1), repeat=n)]
    missed = [sum(b <= low + shift or b >= high + 1 - shift for b in below) / 2**n for shift in (0, 1)]
    assert missed[0] <= 0.05 < missed[1]


def test_median_interval_of_few_samples_is_their_range():
    assert median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    assert median_interval([5.0]) == (5.0, 5.0)


@pytest.mark.parametrize(("n", "q"), [(30, 0.9), (400, 0.99), (400, 0.5), (3000, 0.99)])
def test_a_quantiles_interval_is_the_narrowest_that_covers(n: int, q: float):
    """Each tail against scipy's binomial: of the ranks 1 ... n, how surely the quantile lies beyond."""
    low, high = quantile_interval([float(v) for v in range(1, n + 1)], q)
    assert low is not None
    assert binom.cdf(low - 1, n, q) <= 0.025 < binom.cdf(low, n, q)
    if high is None:
        assert q**n > 0.025
    else:
        assert binom.sf(high - 1, n, q) <= 0.025 < binom.sf(high - 2, n, q)


def test_a_quantiles_interval_covers_in_draws():
    random = np.random.default_rng(0)
    true = -np.log(0.1)  # the 90 % quantile of an exponential
    found = [quantile_interval(random.exponential(size=100).tolist(), 0.9) for _ in range(600)]
    assert 0.94 < np.mean([low <= true <= high for low, high in found]) < 0.99


@pytest.mark.parametrize(("q", "n"), [(0.5, 6), (0.9, 36), (0.99, 368)])
def test_how_many_samples_bound_a_quantile(q: float, n: int):
    values = np.random.default_rng(0).random(n).tolist()
    assert samples_needed(q) == n
    assert quantile_interval(values, q)[1] == max(values)
    assert quantile_interval(values[1:], q)[1] is None


def test_a_percentile_that_so_few_samples_cannot_say():
    values = [float(v) for v in range(1, 31)]
    assert Percentile.of(values, 0.5) == (15.5, 10.0, 21.0)
    assert Percentile.of(values, 0.9) == (quantile(values, 0.9), 23.0, None)
    assert Percentile.of(values, 0.99) == (None, 28.0, None)
    assert Percentile.of([2.0], 0.5) == (2.0, None, None)


class Scripted:
    """A clock that runs the call and returns the next scripted time."""

    def __init__(self, *seconds: float) -> None:
        self.seconds = iter(seconds)

    def __call__(self, call):
        call()
        return next(self.seconds), None


def test_the_first_call_stands_apart():
    found = collect_samples({"": lambda: None}, 2, 3, "cpu", Scripted(9.0, 4.0, 1.0, 2.0, 3.0))[""]
    assert found == Samples((1.0, 2.0, 3.0), (), 9.0)
    assert found.timing.median_s == 2
    assert collect_samples({"": lambda: None}, 0, 1, "cpu", Scripted(9.0))[""] == Samples((9.0,), (), None)


def test_energy_is_the_counters_over_calls_that_fill_the_time():
    """0.4 s a call: three calls fill a second; the counter stands at 100 J before and at 130 J after."""
    counter, calls = iter([100.0, 130.0]), []
    found = energy_per_call(lambda: calls.append(1), lambda: next(counter), 1.0, Scripted(*[0.4] * 5))
    assert found == Energy(10.0, 3, pytest.approx(1.2))
    assert len(calls) == 3


@pytest.mark.parametrize("readings", [[None, None], [5.0, None], [5.0, 5.0]])
def test_no_energy_without_a_counter_that_moves(readings):
    counter = iter(readings)
    assert energy_per_call(lambda: None, lambda: next(counter), 0.0, Scripted(1.0)) is None


def test_clocks_by_device():
    assert clock_for("cpu") is host_clock
    assert clock_for("cuda:1") is cuda_clock


def test_a_ratio_of_medians():
    found = Comparison.of(Timing.of([6.0, 6.0, 9.0]), Timing.of([3.0] * 3), Timing.of([6.3, 6.2, 6.2]))
    assert found.ratio == 2
    assert found.noise == pytest.approx(0.2 / 6.2)


def test_no_ratio_when_the_least_times_of_a_and_a_differ():
    found = Comparison.of(Timing.of([6.0] * 3), Timing.of([3.0] * 3), Timing.of([6.5, 6.5, 6.4]))
    assert found.ratio is None
    assert found.noise == pytest.approx(0.4 / 6.4)


def test_no_ratio_from_two_pairs():
    assert Comparison.of(Timing.of([6.0] * 2), Timing.of([3.0] * 2), Timing.of([6.0] * 2)).ratio is None


def test_a_ratio_is_of_device_time_where_there_is_one():
    found = Comparison.of(*(Timing.of([9.0, 5.0, 1.0], [device] * 3) for device in (4.0, 2.0, 4.0)))
    assert found.ratio == 2
    assert found.noise == 0


def test_peak_of_a_known_pattern_of_allocations():
    def call() -> torch.Tensor:
        a = block(4)
        b = block(8)  # 12 live
        del a, b
        c = block(6)
        return c[: MIB // 2].clone()  # 6.5 live

    memory = peak_memory(call, "cpu")
    assert memory.peak_bytes == 12 * MIB
    assert memory.resident_bytes == 0
    assert memory.reserved_bytes is None
    assert (memory.peak_mib, memory.resident_mib, memory.reserved_mib) == (12, 0, None)


def test_a_view_and_an_update_in_place_allocate_nothing():
    def call() -> None:
        a = block(4)
        a.view(2, -1)[0].add_(1)
        a.reshape(-1).transpose(0, 0)

    assert peak_memory(call, "cpu").peak_bytes == 4 * MIB


def test_inputs_and_weights_are_resident_once():
    x, unused = block(3), block(5)
    memory = peak_memory(lambda: x[:MIB] + x[MIB : 2 * MIB], "cpu", resident=[unused, unused.view(5, -1)])
    assert memory.resident_bytes == 8 * MIB
    assert memory.peak_bytes == 9 * MIB


def test_a_network_without_gradients_holds_one_activation_at_a_time():
    width = 256
    net = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(8)))
    x = torch.randn(1024, width)
    with torch.no_grad():
        lean = peak_memory(lambda: net(x), "cpu", net.parameters())
    full = peak_memory(lambda: net(x), "cpu", net.parameters())
    weights, activation = 8 * width * width * 4, 1024 * width * 4
    assert lean.resident_bytes == full.resident_bytes == weights + activation
    assert lean.peak_bytes - lean.resident_bytes == 2 * activation  # one layer's input and output
    assert full.peak_bytes - full.resident_bytes == 8 * activation  # all kept for the backward pass


def test_it_is_the_same_each_time_and_leaves_nothing_behind():
    def call() -> None:
        sum(torch.randn(1000) for _ in range(50))

    found = {peak_memory(call, "cpu").peak_bytes for _ in range(3)}
    gc.collect()
    assert len(found) == 1


@pytest.mark.gpu
def test_cuda_peak_and_events():
    def call() -> None:
        torch.zeros(64 * MIB, dtype=torch.uint8, device="cuda")

    memory = peak_memory(call, "cuda")
    assert memory.peak_bytes - memory.resident_bytes == 64 * MIB
    assert memory.reserved_bytes is not None
    assert memory.reserved_bytes >= memory.peak_bytes
    timing = interleave({"": call}, 1, 5, "cuda")[""]
    assert timing.device_s is not None
    assert 0 < timing.device_s <= timing.median_s
