"""Curves over a training: where a quality is reached, and the speed-up with its interval, against known cases."""

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from sana_lab.report import learning, learning_plots
from sana_lab.report.learning import Curve, Value, speedup


def is_a_picture(path) -> bool:
    """1200 pixels wide, with something in it that is not cut off."""
    pixels = np.asarray(Image.open(path).convert("L"))
    return pixels.shape[1] == 1200 and (pixels < 128).mean() > 0.002 and pixels[:, 0].min() == 255


def curve(quality: Callable[[float], float], steps=(100, 200, 300, 400), pace: float = 0.5, **options) -> Curve:
    """A curve without noise: `pace` seconds a step, 32 images a step."""
    return [Value(s, 32 * s, pace * s, quality(s), **options) for s in steps]


def noisy(quality: Callable[[float], float], seed: int, prompts: int = 60, spread: float = 0.3) -> Curve:
    """A curve whose numbers per image scatter about its quality, those of a prompt alike at all points."""
    offsets = np.random.default_rng(seed).normal(0, spread, prompts)
    rows = [(s, quality(s) + offsets) for s in (100, 200, 300, 400)]
    ids = list(range(prompts))
    return [Value(s, 32 * s, 0.5 * s, float(y.mean()), None, y.tolist(), ids, "prompts") for s, y in rows]


def test_a_quality_is_reached_between_points():
    x, y = np.array([1.0, 2.0, 4.0]), np.array([0.0, 0.5, 0.25])
    assert learning.reach(x, y, 0.25, 1) == 1.5
    assert learning.reach(x, y, -1.0, 1) == 1.0
    assert learning.reach(x, y, 0.6, 1) is None
    assert learning.reach(x, -y, -0.25, -1) == 1.5


def test_the_speed_up_is_that_of_straight_lines():
    """A row that learns twice as fast a step, and takes three times as long for one."""
    slow, fast = [curve(lambda s: s / 1000)], [curve(lambda s: s / 500, pace=1.5)]
    result = speedup(fast, slow, "steps", "higher")
    assert result == (2.0, 2.0, 2.0, False)
    assert speedup(fast, slow, "images", "higher") == result
    assert speedup(fast, slow, "seconds", "higher").value == pytest.approx(2 / 3)
    assert speedup(slow, slow, "seconds", "higher").value == 1.0
    assert speedup([curve(lambda s: -s / 500)], [curve(lambda s: -s / 1000)], "steps", "lower").value == 2.0


def test_one_that_never_gets_there_is_not_reached():
    slow, fast = [curve(lambda s: s / 1000)], [curve(lambda s: s / 500)]
    assert speedup(slow, fast, "steps", "higher") == (learning.NOT_REACHED, 0.0, 0.0, False)
    assert speedup(fast, [curve(lambda s: 0.1)], "steps", "higher").at_first
    assert speedup([], fast, "steps", "higher") is None
    assert speedup(slow, [curve(lambda s: s, steps=())], "steps", "higher") is None


def test_a_baseline_that_falls_back_needs_what_it_first_needed():
    """Its end is as good as it was after 150 steps."""
    quality = {100: 0.1, 200: 0.3, 300: 0.25, 400: 0.2}
    assert speedup([curve(lambda s: s / 1000)], [curve(quality.__getitem__)], "steps", "higher").value == 0.75


class TestIntervals:
    def test_the_same_prompts_in_both_rows_cancel(self):
        """Offsets of prompts that are the same everywhere move both curves together; those of other prompts do not."""
        base = [noisy(lambda s: s / 1000, 0)]
        alike = speedup([noisy(lambda s: s / 500, 0)], base, "steps", "higher")
        row = [v._replace(prompt_set="others") for v in noisy(lambda s: s / 500, 0)]
        other = speedup([row], base, "steps", "higher")
        assert alike.value == other.value == pytest.approx(2.0)
        assert (alike.low, alike.high) == pytest.approx((2.0, 2.0))
        assert other.low < 1.8
        assert other.high > 2.2

    def test_it_covers_the_truth_over_seeds(self, monkeypatch):
        """In repeats of three seeds whose slopes scatter."""
        monkeypatch.setattr(learning, "RESAMPLES", 500)
        hits, width = 0, []
        for repeat in range(40):
            slopes = np.random.default_rng(repeat).normal(1, 0.05, 6)
            rows = [curve(lambda s, k=k: 1.5 * k * s / 1000) for k in slopes[:3]]
            base = [curve(lambda s, k=k: k * s / 1000) for k in slopes[3:]]
            result = speedup(rows, base, "steps", "higher")
            hits += result.low <= 1.5 <= result.high
            width.append(result.high - result.low)
        assert 32 <= hits <= 40
        assert 0.05 < np.mean(width) < 0.5

    def test_it_shrinks_with_prompts(self):
        def width(prompts: int) -> float:
            base, row = noisy(lambda s: s / 400, 1, prompts), noisy(lambda s: s / 250, 2, prompts)
            result = speedup([[v._replace(prompt_set="others") for v in row]], [base], "steps", "higher")
            return result.high - result.low

        assert width(4000) < 0.3 * width(40)


def test_seeds_meet_at_the_points_that_all_have():
    whole, half = curve(lambda s: s / 1000), curve(lambda s: s / 1000, steps=(200, 400))
    assert [[v.steps for v in each] for each in learning.common([whole, half])] == [[200, 400]] * 2
    assert learning.positions([[Value(1, 1, 5.0, 0), Value(2, 2, 4.0, 0)]], "seconds").tolist() == [[5.0, 5.0]]


def test_plots_show_seeds_or_intervals(tmp_path):
    rows = {"slow": [noisy(lambda s: s / 1000, k) for k in range(3)], "$fast$": [curve(lambda s: s / 500)]}
    paths = learning_plots.write(rows, "geneval", tmp_path, title="T", baseline="slow")
    assert [path.name for path in paths] == [f"geneval_by_{axis}.png" for axis in ("steps", "images", "seconds")]
    for path in paths:
        assert is_a_picture(path)
    one = {"one": [curve(lambda s: s / 1000, interval=(0.1, 0.5))], "none": [[]]}
    assert is_a_picture(learning_plots.learning(one, "psnr", "steps", tmp_path / "one.png", title="T", baseline="one"))
