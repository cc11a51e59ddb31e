"""Where two costs cross: against power laws, whose crossover is known."""

import pytest

from sana_lab.report.crossover import Crossing, Point, crossing

SIZES = (256, 1024, 4096, 16384)


def power(place: float, exponent: float = 1.0, width: float = 1.0) -> list[Point]:
    """Ratios (n / place)^exponent, with an interval `width` times as wide on either side."""
    ratios = [(n / place) ** exponent for n in SIZES]
    return [(n, r, r / width, r * width) for n, r in zip(SIZES, ratios, strict=True)]


@pytest.mark.parametrize("place", [257.0, 700.0, 1024.0, 3000.0, 16000.0])
@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_the_crossover_of_power_laws_is_exact(place: float, exponent: float):
    cross = crossing(power(place, exponent))
    assert cross is not None
    assert cross.at == pytest.approx(place)
    assert cross.low == pytest.approx(place)
    assert cross.high == pytest.approx(place)


def test_the_interval_is_where_the_ends_of_the_ratios_cross():
    cross = crossing(power(2000.0, 1.0, 1.5))
    assert cross is not None
    assert (cross.low, cross.high) == (pytest.approx(2000 / 1.5), pytest.approx(2000 * 1.5))
    assert str(cross) == "at 2000 (95 %: 1333 to 3000)"


def test_an_end_that_crosses_outside_is_open():
    cross = crossing(power(300.0, 1.0, 1.5))
    assert cross is not None
    assert cross.low is None
    assert str(cross) == "at 300 (95 %: < 256 to 450)"
    assert str(crossing(power(12000.0, 1.0, 2.0))) == "at 12000 (95 %: 6000 to > 16384)"


@pytest.mark.parametrize(("place", "side"), [(100.0, "above"), (1e6, "below")])
def test_outside_the_sizes_there_is_no_crossover(place: float, side: str):
    cross = crossing(power(place))
    assert cross == Crossing(None, None, None, 256, 16384, side == "above")
    assert str(cross) == f"not in range: the ratio is {side} 1 at every size from 256 to 16384"


def test_order_does_not_matter_and_one_size_says_nothing():
    points = power(700.0)
    assert crossing(points[::-1]) == crossing(points)
    assert crossing(points[:1]) is None
    with pytest.raises(ValueError, match="positive"):
        crossing([(256, 0.0, 0.0, 0.1), (512, 1.0, 1.0, 1.0)])
