"""Choice of captions: the paper's softmax and the released code's power, a threshold, and turns."""

import numpy as np
import pytest
from scipy import stats

from sana_lab.data.caption_choice import CaptionChoice, choose, probabilities

SCORES = np.array([[30.0, 28.0, 20.0, np.nan], [10.0, 12.0, np.nan, np.nan]])
COUNTS = np.array([3, 2])


def test_softmax_is_the_papers():
    p = probabilities(SCORES, COUNTS, CaptionChoice("softmax", temperature=2.0))
    expected = np.exp(np.array([30, 28, 20]) / 2)
    np.testing.assert_allclose(p[0], [*expected / expected.sum(), 0])
    np.testing.assert_allclose(p.sum(1), 1)


def test_power_is_the_released_codes():
    p = probabilities(SCORES, COUNTS, CaptionChoice("power", temperature=0.1))
    expected = np.array([30, 28, 20]) ** 10.0
    np.testing.assert_allclose(p[0, :3], expected / expected.sum())
    lower = probabilities(SCORES, COUNTS, CaptionChoice("power", temperature=0.001))  # as 0.01
    np.testing.assert_allclose(lower, probabilities(SCORES, COUNTS, CaptionChoice("power", temperature=0.01)))


@pytest.mark.parametrize("rule", ["uniform", "softmax", "power"])
def test_captions_below_the_threshold_are_left_out_but_for_the_best(rule):
    p = probabilities(SCORES, COUNTS, CaptionChoice(rule, min_score=25.0))
    assert (p[0] > 0).tolist() == [True, True, False, False]
    assert p[1].tolist() == [0, 1, 0, 0]


def test_captions_without_a_score_count_as_the_mean():
    p = probabilities(np.array([[30.0, np.nan, 10.0]]), np.array([3]), CaptionChoice("softmax", 5.0, min_score=25.0))
    assert p[0, 2] == 0
    np.testing.assert_allclose(p[0, 0] / p[0, 1], np.exp((30 - 20) / 5))
    without = probabilities(np.full((1, 4), np.nan), np.array([4]), CaptionChoice("power", min_score=25.0))
    np.testing.assert_allclose(without, 0.25)


@pytest.mark.parametrize("rule", ["uniform", "softmax", "power"])
def test_captions_are_chosen_as_often_as_their_probability(rule):
    n, choice = 20_000, CaptionChoice(rule, temperature=3.0 if rule == "softmax" else 0.2)
    chosen = choose(np.tile(SCORES[:1], (n, 1)), np.full(n, 3), np.arange(n), np.zeros(n, int), choice, seed=1)
    expected = probabilities(SCORES[:1], COUNTS[:1], choice)[0, :3] * n
    assert stats.chisquare(np.bincount(chosen, minlength=3), expected).pvalue > 1e-4


def test_a_choice_depends_on_seed_row_and_turn_alone():
    rows, turns, choice = np.arange(100), np.arange(100) % 7, CaptionChoice("uniform")
    scores, counts = np.zeros((100, 5)), np.full(100, 5)
    whole = choose(scores, counts, rows, turns, choice, 3)
    single = [int(choose(scores[i : i + 1], counts[:1], rows[i : i + 1], turns[i : i + 1], choice, 3)[0]) for i in rows]
    assert whole.tolist() == single
    assert (choose(scores, counts, rows, turns, choice, 4) != whole).any()


def test_rotation_takes_all_in_turn():
    scores, counts = np.tile(SCORES[:1], (3, 1)), np.full(3, 3)
    turns = [choose(scores, counts, np.arange(3), np.full(3, t), CaptionChoice(), 0).tolist() for t in range(3)]
    assert all(sorted(row[i] for row in turns) == [0, 1, 2] for i in range(3))
    above = [choose(scores, counts, np.arange(3), np.full(3, t), CaptionChoice(min_score=25.0), 0) for t in range(2)]
    assert all(sorted(row[i] for row in above) == [0, 1] for i in range(3))
