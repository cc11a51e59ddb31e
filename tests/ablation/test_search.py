"""Axes by product, zip and list; exclusions; samples of ranges; rows matched at equal parameters, MACs and images."""

from pathlib import Path
from typing import ClassVar

import pytest
import tiny

from sana_lab.ablation import plan
from sana_lab.ablation.matching import quantity
from sana_lab.ablation.samples import axis_of, scaled, unit_points
from sana_lab.config.schema import Match, Range, Samples
from sana_lab.config.specs import SpecError

AXES = """
title: Two axes
base: tiny
axes:
  a: {one: {sampling.steps: 1}, two: {sampling.steps: 2}, three: {sampling.steps: 3}}
  b: {x: {sampling.guidance: 1.0}, y: {sampling.guidance: 2.0}, z: {sampling.guidance: 3.0}}
"""

WIDTHS = """
title: Widths
base: tiny
axes: {attention: {softmax: {system.dit.attention: softmax}, deep: {system.dit.depth: 2}}}
"""


@pytest.fixture
def folder(here: Path) -> Path:
    tiny.write_experiment(here)
    return here


def load(folder: Path, text: str) -> plan.Plan:
    tiny.write(folder, "ablations/search.yaml", text)
    return plan.load("search")


def labels(folder: Path, text: str) -> list[str]:
    return [trial.label for trial in load(folder, text).trials]


class TestCells:
    def test_axes_combine_in_three_ways(self, folder):
        assert len(labels(folder, AXES)) == 9
        assert labels(folder, f"{AXES}combine: zip\n") == ["one · x", "two · y", "three · z"]
        one_at_a_time = ["one · x", "two · x", "three · x", "one · y", "one · z"]
        assert labels(folder, f"{AXES}combine: list\n") == one_at_a_time

    def test_exclusions_leave_rows_out(self, folder):
        rows = labels(folder, f"{AXES}exclude: [{{a: one}}, {{a: two, b: [x, y]}}]\n")
        assert rows == ["two · z", "three · x", "three · y", "three · z"]

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("exclude: [{c: one}]", "excludes labels of 'c', which is no axis"),
            ("exclude: [{a: tow}]", "excludes 'tow' of 'a'; did you mean 'two'"),
            ("exclude: [{}]", "has an empty exclusion"),
            ("exclude: [{a: [one, two, three]}]", "excludes all of its rows"),
            ("combine: zip\nexclude: [{a: one, b: z}]", "which is no combination of its labels"),
            ("combine: zap", 'expected one of "product", "zip", "list"; did you mean \'zip\''),
        ],
    )
    def test_mistakes_are_refused(self, folder, text, words):
        with pytest.raises(SpecError, match=words):
            load(folder, f"{AXES}{text}\n")

    def test_axes_of_different_lengths_are_not_zipped(self, folder):
        with pytest.raises(SpecError, match="zips axes of different lengths \\(a 3, b 2\\)"):
            load(folder, AXES.replace(", z: {sampling.guidance: 3.0}", "") + "combine: zip\n")


class TestSamples:
    RANGES: ClassVar = {"trainer.max_steps": Range(2, 64, log=True, integer=True), "sampling.guidance": Range(1.0, 5.0)}

    @pytest.mark.parametrize("method", ["sobol", "random"])
    def test_more_points_keep_the_first(self, method):
        few, many = (list(axis_of(Samples(n, self.RANGES, method), "it")) for n in (5, 12))
        assert many[:5] == few
        assert len(set(many)) == 12
        assert list(axis_of(Samples(5, self.RANGES, method, seed=1), "it")) != few

    def test_sobol_points_fill_each_half_of_each_range_equally(self):
        points = unit_points(Samples(64, self.RANGES))
        assert ((points < 0.5).sum(axis=0) == 32).all()

    def test_ends_of_ranges(self):
        integer = Range(2, 5, integer=True)
        assert [scaled(integer, u) for u in (0.0, 0.24, 0.26, 0.99999)] == [2, 2, 3, 5]
        log = Range(1e-4, 1e-2, log=True)
        assert [scaled(log, u) for u in (0.0, 0.5)] == [1e-4, 1e-3]

    def test_they_are_an_axis(self, folder):
        text = f"{WIDTHS}samples: {{number: 4, ranges: {{trainer.max_steps: {{low: 2, high: 50, integer: true}}}}}}\n"
        trials = load(folder, text).trials
        assert len(trials) == 8
        steps = [trial.config["trainer"]["max_steps"] for trial in trials[:4]]
        assert [trial.labels["sample"] for trial in trials[:4]] == [f"max_steps {n}" for n in steps]

    @pytest.mark.parametrize(
        ("limits", "words"),
        [
            ("{low: 2, high: 2}", "from 2 to 2, expected low below high"),
            ("{low: 0, high: 2, log: true}", "logarithmic from 0, expected low above 0"),
            ("{low: 2, high: 3, integer: true}", "samples 4 points, of which 2 differ"),
        ],
    )
    def test_mistakes_are_refused(self, folder, limits, words):
        with pytest.raises(SpecError, match=words):
            load(folder, f"{WIDTHS}samples: {{number: 4, ranges: {{trainer.max_steps: {limits}}}}}\n")


class TestMatch:
    @pytest.mark.parametrize("equal", ["parameters", "macs"])
    def test_the_width_is_chosen_within_the_share(self, folder, equal):
        heads = "{name: softmax, head_dim: 8}"  # widths are multiples of 8
        text = WIDTHS.replace("attention: softmax", f"attention: {heads}").replace(
            "depth: 2", f"depth: 2, system.dit.attention: {heads}"
        )
        match = f"common: {{system.dit.dim: 1024}}\nmatch: {{equal: {equal}, by: system.dit.dim, step: 8}}\n"
        ablation = load(folder, text + match)
        first, second = ablation.trials
        ratio = quantity(second.config, Match(equal)) / quantity(first.config, Match(equal))
        assert abs(ratio - 1) <= 0.02
        assert second.config["system"]["dit"]["dim"] < 1024
        name = f"'deep' dim {second.config['system']['dit']['dim']} ({ratio - 1:+.1%})"
        assert ablation.table.notes == [f"Matched at the {equal} of 'softmax' within 2%: {name}."]

    def test_steps_are_chosen_for_equal_images(self, folder):
        text = WIDTHS.replace("deep: {system.dit.depth: 2}", "large: {data.batch: 8}")
        match = "common: {trainer.max_steps: 400}\nmatch: {equal: images, by: trainer.max_steps}\n"
        assert [t.config["trainer"]["max_steps"] for t in load(folder, text + match).trials] == [400, 200]

    def test_seconds_are_those_of_every_row(self, folder):
        trials = load(folder, f"{WIDTHS}match: {{equal: seconds, seconds: 3}}\n").trials
        assert [t.config["trainer"]["max_seconds"] for t in trials] == [3.0, 3.0]

    @pytest.mark.parametrize(
        ("match", "words"),
        [
            ("{equal: seconds}", "expected match.seconds"),
            ("{equal: macs}", "expected match.by system.dit.dim"),
            ("{equal: images, by: trainer.max_steps, reference: dep}", "which is no row; did you mean 'deep'"),
            ("{equal: images, by: trainer.max_steps, step: 7}", "cannot be matched at equal images"),
        ],
    )
    def test_mistakes_are_refused(self, folder, match, words):
        with pytest.raises(SpecError, match=words):
            load(folder, f"{WIDTHS}match: {match}\n")
