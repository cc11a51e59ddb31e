"""Learning rates as functions of the step."""

import pytest

from sana_lab.systems.schedule import factor


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.1), (4, 0.5), (9, 1.0), (10, 1.0), (59, 1.0), (60, 1.0), (80, 0.5), (99, 0.025), (100, 0.0), (120, 0.0)],
)
def test_up_flat_and_down(step: int, expected: float):
    """Ten steps of warm-up, a hundred in all, the last 40 % to zero."""
    assert factor(step, 100, 10, 0.4) == pytest.approx(expected)


def test_without_warm_up_or_decay_it_is_constant():
    assert {factor(step, 100, 0, 0.0) for step in range(200)} == {1.0}


def test_endless_training_never_decays():
    assert factor(10**6, -1, 10, 0.4) == 1.0


def test_warm_up_and_decay_may_meet():
    rates = [factor(step, 10, 8, 1.0) for step in range(11)]
    assert rates == pytest.approx([min(1, (s + 1) / 8) * (1 - s / 10) for s in range(11)])
