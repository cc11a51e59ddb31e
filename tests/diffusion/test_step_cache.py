"""Step caches against the whole network, step by step, on a tiny DiT."""

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from sana_lab.config import experiments, hashing, schema, specs
from sana_lab.config.specs import SpecError
from sana_lab.diffusion.flow import Flow
from sana_lab.diffusion.guidance import guided
from sana_lab.diffusion.sampling import Sampling
from sana_lab.diffusion.step_cache import CachedSteps, relative_change
from sana_lab.models.dit import Dit, TextDit
from sana_lab.types import Velocity

STEPS, ROWS = 12, 3
NULLS = {"one token": tiny.caption([1], 3), "negative prompt": tiny.caption([4], 3), "each": tiny.caption([5, 2, 3], 3)}
PROMPTS = tiny.caption([5, 9, 2])
CACHES = ["first_block", "tea"]


@pytest.fixture(scope="module")
def dit() -> Dit:
    return tiny.dit(dtype=torch.float64, depth=4)


def velocity(dit: Dit, cache: Any, scale: float = 3.0, null: str = "one token", rows: slice = slice(None)) -> Velocity:
    how = Sampling("euler", STEPS, scale)
    bind = {} if cache is None else {"bind": lambda model: CachedSteps(specs.build("cache", cache), model)}
    prompts, nulls = (type(t)(t.tokens[rows], t.mask[rows]) if len(t.tokens) > 1 else t for t in (PROMPTS, NULLS[null]))
    return guided(dit, prompts, nulls, scale, None, how.network_times(Flow(), torch.float64), **bind)


def noise(rows: slice = slice(None)) -> Tensor:
    return tiny.latents(ROWS)[rows]


def run(velocity: Velocity, rows: slice = slice(None)) -> Tensor:
    return Sampling("euler", STEPS).run(velocity, noise(rows), Flow())


def spec(name: str, threshold: float) -> dict[str, Any]:
    return {"name": name, "threshold": threshold}


def blocks_of(dit: Dit, call: Any) -> list[int]:
    """Rows that each run of the last block has."""
    rows: list[int] = []
    hook = dit.blocks[-1].register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    try:
        call()
    finally:
        hook.remove()
    return rows


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("null", NULLS)
@pytest.mark.parametrize("scale", [1.0, 3.0])
@torch.no_grad()
def test_threshold_0_computes_every_step(dit: Dit, cache: str, null: str, scale: float):
    """To the last bit."""
    expected = run(velocity(dit, None, scale, null))
    assert torch.equal(run(velocity(dit, spec(cache, 0.0), scale, null)), expected)


@pytest.mark.parametrize("cache", CACHES)
@torch.no_grad()
def test_a_large_threshold_computes_the_first_step_alone(dit: Dit, cache: str):
    """Later steps take its residual: projecting tokens + residual by hand gives them."""
    model = velocity(dit, spec(cache, 1e9))
    assert blocks_of(dit, lambda: run(model)) == [ROWS * 2]
    prepared = dit.prepare(PROMPTS)
    cached = CachedSteps(specs.build("cache", spec(cache, 1e9)), prepared)
    x, late, early = noise(), *(torch.full((ROWS,), t, dtype=torch.float64) for t in (0.2, 0.9))
    passed = {"first_block": 1, "tea": 0}[cache]
    before = prepared.run(prepared.embed(x), prepared.step_inputs(early), 0, passed)
    residual = prepared.run(before, prepared.step_inputs(early), passed) - before
    assert torch.equal(cached(x, early), prepared(x, early))
    tokens = prepared.run(prepared.embed(2 * x), prepared.step_inputs(late), 0, passed)
    expected = prepared.project(tokens + residual, prepared.step_inputs(late))
    assert tiny.error(cached(2 * x, late), expected) <= 1e-12
    assert tiny.error(cached(2 * x, late), prepared(2 * x, late)) > 1e-3


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("null", NULLS)
@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(dit: Dit, cache: str, null: str):
    """Images of a batch run their blocks in different steps, each as when it is alone."""
    cached = spec(cache, threshold(dit, cache))
    rows = blocks_of(dit, lambda: run(velocity(dit, cached, null=null)))
    assert len(rows) < STEPS or min(rows) < 2 * ROWS, "nothing was reused"
    together = run(velocity(dit, cached, null=null))
    for i in range(ROWS):
        alone = run(velocity(dit, cached, null=null, rows=slice(i, i + 1)), slice(i, i + 1))
        assert tiny.error(together[i : i + 1], alone) <= 1e-10


def threshold(dit: Dit, cache: str) -> float:
    """The largest change of any image in the first two steps but one: some images exceed it and some do not."""
    model = CachedSteps(specs.build("cache", spec(cache, 0.0)), dit.prepare(PROMPTS))
    changes: list[Tensor] = []
    times, x = Flow().schedule(STEPS), noise()
    for t in times[:3]:
        inputs = model.model.step_inputs(t.expand(ROWS))
        signal, _, _ = model.cache.start(model.model, model.model.embed(x), inputs)
        if model.signal is not None:
            changes.append(relative_change(signal, model.signal, 1))
        model.signal = signal
        x = 0.9 * x
    return float(torch.cat(changes).median()) * 1.5


@torch.no_grad()
def test_a_higher_threshold_computes_less_and_errs_more(dit: Dit):
    expected = run(velocity(dit, None))
    for cache in CACHES:
        middle = threshold(dit, cache)
        counts, errors = [], []
        for value in (0.0, middle, 1e9):
            model = velocity(dit, spec(cache, value))
            rows = blocks_of(dit, lambda model=model: run(model))
            counts.append(sum(rows))
            errors.append(tiny.error(run(velocity(dit, spec(cache, value))), expected))
        assert counts[0] > counts[1] > counts[2]
        assert 0 == errors[0] < errors[1] < errors[2]


def test_relative_change_of_images_with_two_rows():
    reference = torch.ones(4, 1, 2, 1)
    signal = reference + torch.tensor([0.1, 0.0, 0.3, 0.0]).view(4, 1, 1, 1)
    assert relative_change(signal, reference, 2).tolist() == pytest.approx([0.2, 0.0])
    assert relative_change(signal, reference, 1).tolist() == pytest.approx([0.1, 0.0, 0.3, 0.0])


def test_what_a_cache_does_not_go_with(dit: Dit):
    with pytest.raises(ValueError, match=r"sampling.graph is 'always', and sampling.cache"):
        Sampling(cache="tea", graph="always")
    with pytest.raises(SpecError, match="needs a denoiser of blocks"):
        CachedSteps(specs.build("cache", "tea"), TextDit(dit, PROMPTS))
    with pytest.raises(SpecError, match="no cache is called 'first'"):
        experiments.check_sampling({"cache": "first"})


def test_a_cache_is_a_trial_of_its_own_of_the_same_model():
    plain = experiments.load("shapes_sana")
    cached = experiments.load("shapes_sana", ["sampling.cache=first_block"])
    assert cached["sampling"]["cache"] == {"name": "first_block", "threshold": 0.1}
    assert hashing.experiment_hash(plain) == hashing.experiment_hash(cached)
    keys = {hashing.trial_hash(schema.Trial({}, 0, e)) for e in (plain, cached)}
    assert len(keys) == 2


def test_a_system_samples_with_a_cache():
    system = tiny.text2image(dit={**tiny.DIT, "depth": 2}).eval()
    images = [
        system.sample(["a ring", "a cross"], size=16, sampling=Sampling("euler", 6, 3.0, cache=cache))
        for cache in (None, spec("first_block", 0.0), spec("first_block", 1e9))
    ]
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])
