"""Token routing: the subset, the convolution with holes by loops, gradients under activation checkpointing."""

from typing import Any

import pytest
import tiny
import torch
from tiny_methods import step
from torch import Tensor
from torch.nn import functional as F

from sana_lab.config import specs
from sana_lab.config.specs import SpecError
from sana_lab.methods import Model
from sana_lab.methods.tread import Route, skip
from sana_lab.systems.method_steps import Methods

GRID = (4, 6)


def route(count: int = 9) -> Route:
    random = torch.rand(2, 24, generator=torch.Generator().manual_seed(0))
    return Route(random.argsort(1)[:, :count].sort(1).values, GRID)


def mix_ffn() -> Any:
    torch.manual_seed(0)
    return specs.build("ffn", "mix", dim=8).double()


def convolved(ffn: Any, tokens: Tensor, r: Route, neighbours: bool) -> Tensor:
    """Mix-FFN of scattered tokens (B, 1, n, C) by loops; other tokens are zero, or neighbours are left out."""
    weight, bias, half = ffn.depthwise.weight[:, 0], ffn.depthwise.bias, ffn.project.in_features
    rows = []
    for b in range(len(tokens)):
        expanded = {divmod(int(at), GRID[1]): F.silu(ffn.expand(tokens[b, 0, k])) for k, at in enumerate(r.indices[b])}
        for i, j in expanded:
            y = bias.clone()
            for di, dj in [(di, dj) for di in (-1, 0, 1) for dj in (-1, 0, 1)] if neighbours else [(0, 0)]:
                if (i + di, j + dj) in expanded:
                    y = y + weight[:, di + 1, dj + 1] * expanded[i + di, j + dj]
            rows.append(ffn.project(y[:half] * F.silu(y[half:])))
    return torch.stack(rows).reshape(tokens.shape)


@pytest.mark.parametrize("holes", ["fill", "skip"])
def test_the_convolution_with_holes_is_its_definition(holes: str):
    ffn, r = mix_ffn(), route()
    tokens = torch.randn(2, 1, 9, 8, dtype=torch.float64)
    ffn.scattered = r.fill if holes == "fill" else skip
    torch.testing.assert_close(ffn(tokens), convolved(ffn, tokens, r, holes == "fill"))


def test_all_tokens_in_their_order_fill_the_grid():
    ffn, tokens = mix_ffn(), torch.randn(2, *GRID, 8, dtype=torch.float64)
    whole = ffn(tokens)
    r = Route(torch.arange(24).expand(2, -1), GRID)
    ffn.scattered = r.fill
    torch.testing.assert_close(r.whole(ffn(r.enter(tokens))), whole)


def forward(holes: str, checkpointing: Any, read: tuple[int, ...] = ()) -> tuple[Tensor, dict[int, Tensor], Any]:
    """A DiT of four blocks under a route around the two in the middle: output, hidden states, the DiT."""

    dit = tiny.dit(depth=4, dtype=torch.float64, checkpointing=checkpointing).train()
    methods = Methods({"name": "tread", "share": 0.5, "start": 1, "stop": 3, "holes": holes})
    methods.build(Model(dit, 64, (4, 4)), 0)
    methods[0].blocks = read
    s = step()
    text = tiny.caption([3] * 4)
    with methods.around(dit, s):
        out = dit(s.latents.double(), s.times.double(), text)
    methods.terms(s)
    return out, s.hidden, dit


@pytest.mark.parametrize("holes", ["fill", "skip"])
def test_blocks_of_the_route_run_on_the_subset_and_all_tokens_return(holes: str):
    out, hidden, dit = forward(holes, False, (0, 1, 2, 3))
    changed = (hidden[1] != hidden[0]).any(-1).flatten(1).sum(1)
    assert changed.tolist() == [8] * 4
    assert ((hidden[2] != hidden[0]).any(-1).flatten(1).sum(1) == 8).all()
    assert (hidden[3] != hidden[2]).any(-1).all()
    assert dit.around is None
    assert all(block.ffn.scattered is None for block in dit.blocks)
    kept = (hidden[1] != hidden[0]).any(-1).flatten(1)
    assert len({tuple(row.tolist()) for row in kept}) > 1  # another subset for each sample
    with torch.no_grad():
        assert not torch.equal(out, dit(torch.zeros_like(out), torch.zeros(4), tiny.caption([3] * 4)))


@pytest.mark.parametrize("mode", [True, "selective"])
@pytest.mark.parametrize("holes", ["fill", "skip"])
def test_activation_checkpointing_gives_the_same_gradients(holes: str, mode: Any):
    gradients = []
    for checkpointing in (False, mode):
        out, hidden, dit = forward(holes, checkpointing, (1, 3))
        (out.square().mean() + hidden[1].square().mean()).backward()
        gradients.append([p.grad for p in dit.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("attention", ["mhla", "gated_linear", "gated_delta", "conv"])
def test_mixers_that_read_the_grid_are_refused_inside_a_route(attention: str):
    grid: dict[str, Any] = {"name": attention, **({} if attention == "conv" else {"head_dim": 8})}
    pattern = [{"name": "linear", "head_dim": 8}, grid]
    model = Model(tiny.dit(depth=4, attention=pattern), 64, (4, 4))
    with pytest.raises(
        SpecError, match="needs their grid; expected attention softmax, linear or mean in blocks 1 to 2"
    ):
        Methods({"name": "tread", "start": 1, "stop": 3}).build(model, 0)
    Methods({"name": "tread", "start": 0, "stop": 1}).build(model, 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"start": 3, "stop": 2}, "expected 0 <= start < stop <= 4"),
        ({"stop": 5}, "expected 0 <= start < stop <= 4"),
        ({"share": 0.01}, "leaves 16 of 16 tokens"),
    ],
)
def test_routes_that_do_not_fit_are_refused(options: dict[str, Any], words: str):
    with pytest.raises(SpecError, match=words):
        Methods({"name": "tread", **options}).build(Model(tiny.dit(depth=4), 64, (4, 4)), 0)
