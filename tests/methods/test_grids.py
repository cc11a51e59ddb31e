"""Training methods on batches in aspect-ratio buckets, whose grids of tokens are not squares."""

from typing import Any

import pytest
import tiny
import torch
from tiny_methods import GRID, model, step
from torch.nn import functional as F

from sana_lab.config import registry, specs
from sana_lab.config.specs import SpecError
from sana_lab.contracts.methods import WIDE
from sana_lab.methods import Grid
from sana_lab.systems.method_steps import Methods

OPTIONS: dict[str, dict[str, Any]] = {"distill": {"teacher": "sana"}}
TALL = (8, 2)
BUCKETS = [(64, 64), (32, 128), (128, 32)]
"""Pixels of GRID, WIDE and TALL."""


def methods(name: str, dit: Any, **options: Any) -> Methods:
    """One method, built for batches of all three shapes."""
    built, teacher = Methods({"name": name, **OPTIONS.get(name, {}), **options}), tiny.dit(depth=4)
    built.build(model(dit=dit, buckets=BUCKETS, frozen=lambda kind, spec, **supplied: teacher), 0)
    return built


def run(built: Methods, dit: Any, grid: Grid) -> Any:
    """A step on a batch of this grid up to its terms."""
    s, text = step(grid=grid), tiny.caption([3] * 4, dtype=torch.float32)
    s.text, s.null = text, lambda: tiny.caption([1], seed=5, dtype=torch.float32)
    with built.around(dit, s):
        s.prediction = dit(s.latents, s.times, text)
    return s, built.terms(s)


@pytest.mark.parametrize("name", sorted(registry.TABLE["method"]))
def test_every_method_trains_on_batches_of_several_shapes(name: str):
    dit = tiny.dit(depth=4, mean_velocity=True)
    built = methods(name, dit)
    for grid in (GRID, WIDE, TALL):
        s, terms = run(built, dit, grid)
        assert s.grid == grid
        loss = (s.prediction - s.target).square().mean() + sum(weight * value for weight, value in terms.values())
        assert torch.isfinite(loss)
        gradients = torch.autograd.grad(loss, [*dit.parameters()], allow_unused=True)
        assert all(bool(g.isfinite().all()) for g in gradients if g is not None)
        assert any(g is not None and bool(g.any()) for g in gradients)


def test_a_route_keeps_the_share_of_each_batchs_tokens():
    dit = tiny.dit(depth=4)
    for share, kept in ((0.5, 8), (0.25, 12)):
        built = methods("tread", dit, share=share)
        built[0].blocks = (0, 1)
        for grid in (GRID, WIDE, TALL):
            hidden = run(built, dit, grid)[0].hidden
            assert hidden[1].shape[1:3] == grid
            assert ((hidden[1] != hidden[0]).any(-1).flatten(1).sum(1) == kept).all()


def test_alignment_with_a_square_teacher_is_on_the_grid_of_the_batch():
    """The teacher's 8 x 8 cells, interpolated to the tokens of a wide batch."""
    dit = tiny.dit(depth=4)
    built = methods("repa", dit, fit="interpolate", block=2)
    s, terms = run(built, dit, WIDE)
    extractor = specs.build("extractor", "shapes")
    cells = extractor.tokens(((s.images + 1) * 127.5).round().to(torch.uint8)).movedim(-1, 1)
    assert cells.shape[2:] == (8, 8)
    targets = F.interpolate(cells, WIDE, mode="bilinear", antialias=True).movedim(1, -1)
    expected = -F.cosine_similarity(built[0].projector(s.hidden[2]), targets, dim=-1).mean()
    torch.testing.assert_close(terms["repa"][1], expected)


@pytest.mark.parametrize(
    ("name", "buckets", "words"),
    [
        ("repa", [(48, 80)], "teacher 'shapes', in the aspect-ratio bucket of 48 x 80 pixels, has 8 x 8 tokens"),
        ("irepa", [(48, 80)], "and the DiT 3 x 5; expected fit: interpolate"),
        ("tread", [(16, 16)], "'tread' has share 0.5, which leaves 1 of 1 tokens"),
    ],
)
def test_a_bucket_that_does_not_fit_is_refused_when_the_method_is_built(
    name: str, buckets: list[tuple[int, int]], words: str
):
    with pytest.raises(SpecError, match=words):
        Methods(name).build(model(buckets=buckets), 0)
