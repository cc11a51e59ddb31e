"""Costs under a step cache: of all steps, of trained weights, with the share of the blocks that ran."""

import pytest
import tiny

from sana_lab.bench.bench import bench, bench_experiment
from sana_lab.config import experiments
from sana_lab.config.specs import SpecError
from sana_lab.diffusion.sampling import Sampling


@pytest.mark.parametrize(("threshold", "percent"), [(0.0, 100), (1e9, 25)])
def test_the_share_of_blocks_that_ran(threshold: float, percent: float):
    """Of 4 steps all, or the first alone."""
    cache = {"name": "tea", "threshold": threshold}
    record = bench(tiny.text2image().eval(), Sampling("euler", 4, 3.0, cache=cache), 16, repeats=1, warmup=0)
    assert record["blocks_computed"] == pytest.approx(percent)
    assert [note for note in record["notes"] if note.startswith("blocks_computed")]


def test_what_cannot_be_measured(here):
    system, cached = tiny.text2image().eval(), Sampling("euler", 4, 3.0, cache="tea")
    with pytest.raises(ValueError, match=r"measured_steps is 1, .*eval.bench_steps=null"):
        bench(system, cached, 16, repeats=1, measured_steps=1)
    tiny.write_experiment(here)
    with pytest.raises(SpecError, match=r"sampling.cache is 'tea', whose speed depends on the weights"):
        bench_experiment(experiments.load("tiny", ["sampling.cache=tea"]))
