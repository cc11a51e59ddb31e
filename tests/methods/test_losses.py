"""Each loss term against its definition in loops, and what the step gives to methods."""

import math
from typing import Any

import pytest
import tiny
import torch
from tiny_methods import model, step
from torch import Tensor

from sana_lab.config import registry, specs
from sana_lab.config.specs import SpecError
from sana_lab.methods import Method, Step
from sana_lab.methods.dispersive import dispersion
from sana_lab.methods.irepa import normalised
from sana_lab.methods.teacher import common_grid, interpolated, pooled
from sana_lab.types import Part, Text


def method(name: str, **options: Any) -> Any:
    torch.manual_seed(1)
    part = specs.build("method", {"name": name, **options})
    part.name = name
    part.build(model())
    return part


def cosine(a: Tensor, b: Tensor) -> float:
    return float(((a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())).detach())


# --- loss terms


@pytest.mark.parametrize("draws", [1, 2])
def test_contrastive_is_minus_the_error_against_the_item_before(draws: int):
    s = step(draws=draws)
    total = 0.0
    for i, prediction in enumerate(s.prediction):
        total += float((prediction - s.target[i - draws]).square().mean())
    value = method("contrastive").losses(s)["contrastive"]
    assert float(value) == pytest.approx(-total / len(s.prediction), rel=1e-5)


def test_dispersive_is_the_log_of_the_mean_over_all_pairs():
    s = step([0])
    z = s.hidden[0].flatten(1)
    pairs = [math.exp(-float((a - b).square().mean()) / 0.3) for a in z for b in z]
    value = method("dispersive", tau=0.3).losses(s)["dispersive"]
    assert float(value) == pytest.approx(math.log(sum(pairs) / len(pairs)), rel=1e-4)
    assert float(dispersion(torch.ones(3, 5), 0.5)) == pytest.approx(0.0, abs=1e-6)


def test_direction_is_one_minus_the_cosine_over_channels():
    s = step()
    cells = [(n, i, j) for n in range(4) for i in range(4) for j in range(4)]
    cosines = [cosine(s.prediction[n, :, i, j], s.target[n, :, i, j]) for n, i, j in cells]
    assert float(method("direction").losses(s)["direction"]) == pytest.approx(1 - sum(cosines) / len(cells), rel=1e-5)


@pytest.mark.parametrize("draws", [1, 2])
def test_front_channels_is_the_mean_error_of_the_channels_in_front(draws: int):
    s, total = step(draws=draws), 0.0
    counts = (s.uniform(1)[:, 0] * 4).long() + 1
    assert len(set(counts.tolist())) > 1
    for count, prediction, target in zip(counts.tolist(), s.prediction, s.target, strict=True):
        total += float((prediction[:count] - target[:count]).square().mean())
    value = method("front_channels").losses(step(draws=draws))["front_channels"]
    assert float(value) == pytest.approx(total / len(counts), rel=1e-5)
    with pytest.raises(SpecError, match="has step 5, and the latents have 4 channels"):
        method("front_channels", step=5)


def teacher_tokens(s: Step, grid: int) -> Tensor:
    """The mean of the attribute network's 8 x 8 cells in each cell of a coarser grid, (B, grid, grid, D)."""
    extractor = specs.build("extractor", "shapes")
    cells = extractor.tokens(((s.images + 1) * 127.5).round().to(torch.uint8))
    side = 8 // grid
    rows = [[cells[:, i * side : (i + 1) * side, j * side : (j + 1) * side] for j in range(grid)] for i in range(grid)]
    return torch.stack([torch.stack([c.mean((1, 2)) for c in row], 1) for row in rows], 1)


@pytest.mark.parametrize("draws", [1, 2])
def test_repa_is_minus_the_mean_cosine_with_the_teachers_tokens(draws: int):
    part, s = method("repa", block=2, hidden=16), step([2], draws=draws)
    targets, cosines = teacher_tokens(s, 4), []
    for n, i, j in ((n, i, j) for n in range(4 * draws) for i in range(4) for j in range(4)):
        x = s.hidden[2][n, i, j]
        for layer in part.projector:
            x = x * torch.sigmoid(x) if isinstance(layer, torch.nn.SiLU) else layer.weight @ x + layer.bias
        cosines.append(cosine(x, targets[n // draws, i, j]))
    assert part.losses(s)["repa"].item() == pytest.approx(-sum(cosines) / len(cosines), rel=1e-4)


def test_irepa_is_a_convolution_against_tokens_normalised_over_the_grid():
    part, s = method("irepa", block=1, gamma=0.7), step([1])
    targets, weight, bias = teacher_tokens(s, 4), part.projector.weight, part.projector.bias
    cosines = []
    for n in range(4):
        flat = targets[n].reshape(16, -1)
        mean, deviation = flat.mean(0), (flat - flat.mean(0)).square().mean(0).sqrt()
        for i in range(4):
            for j in range(4):
                y = bias.clone()
                for di in (-1, 0, 1):
                    for dj in (-1, 0, 1):
                        if 0 <= i + di < 4 and 0 <= j + dj < 4:
                            y = y + weight[:, :, di + 1, dj + 1] @ s.hidden[1][n, i + di, j + dj]
                cosines.append(cosine(y, (targets[n, i, j] - 0.7 * mean) / (deviation + 1e-6)))
    assert part.losses(s)["irepa"].item() == pytest.approx(-sum(cosines) / 16 / 4, rel=1e-3)
    centred = normalised(targets, 1.0)
    torch.testing.assert_close(centred.mean((1, 2)), torch.zeros(4, 96), atol=1e-4, rtol=0)


def test_distill_is_the_error_of_each_block_over_the_size_of_the_teachers():
    teacher = tiny.dit(depth=4, attention={"name": "softmax", "head_dim": 8})
    part, s = specs.build("method", {"name": "distill", "teacher": "sana"}), step(range(4), rows=3, draws=2)
    part.name = "distill"
    part.build(model(frozen=lambda kind, spec, **supplied: teacher))
    s.text = tiny.caption([3, 2, 1], dtype=torch.float32)
    total, sizes = 0.0, []
    with torch.no_grad():
        for i in range(6):
            t, text = s.times[i], Text(s.text.tokens[i // 2][None], s.text.mask[i // 2][None])
            tokens = teacher.embed(((1 - t) * s.latents[i] + t * s.noise[i])[None])
            six, caption = teacher.modulation(t[None])[1], teacher.caption_embed(text.tokens)
            for block in teacher.blocks:
                tokens = block(tokens, block.table + six, *block.cross.keys_values(caption), text.mask)
                sizes.append(tokens)
    targets = [torch.cat(sizes[block::4]) for block in range(4)]
    for block in range(4):
        total += float((s.hidden[block] - targets[block]).square().sum() / targets[block].square().sum()) / 4
    assert float(part.losses(s)["distill"]) == pytest.approx(total, rel=1e-4)
    assert teacher.around is None
    s.hidden = dict(enumerate(targets))
    assert float(part.losses(s)["distill"]) == pytest.approx(0.0, abs=1e-9)


def test_distill_needs_a_teacher_of_the_same_shape_and_frozen_text():
    part = specs.build("method", {"name": "distill", "teacher": "sana"})
    part.name = "distill"
    with pytest.raises(SpecError, match="width 32 and 2 blocks, and the DiT has width 32 and 4 blocks"):
        part.build(model(frozen=lambda kind, spec, **supplied: tiny.dit(depth=2)))
    with pytest.raises(SpecError, match=r"expected system\.train_text: false"):
        part.build(model(text_trains=True))


@pytest.mark.parametrize("name", sorted({*registry.TABLE["method"]} - {"distill"}))  # which needs a teacher
def test_terms_are_finite_scalars_with_a_gradient_to_the_model(name: str):
    part = method(name)
    s = step(part.blocks)
    leaves = [s.prediction, *s.hidden.values()]
    for leaf in leaves:
        leaf.requires_grad_(True)
    terms = part.losses(s)
    assert set(terms) <= {name}
    for value in terms.values():
        assert value.shape == ()
        assert torch.isfinite(value)
        assert any(g is not None for g in torch.autograd.grad(value, leaves, allow_unused=True))
    assert terms or part.changes_forward


# --- the grid of a teacher


def test_grids_that_differ_meet_on_the_coarser_one():
    assert common_grid((8, 8), (2, 2), "pool", "x") == (2, 2)
    assert common_grid((4, 4), (16, 16), "pool", "x") == (4, 4)
    assert common_grid((1, 1), (4, 4), "pool", "x") == (1, 1)
    assert common_grid((7, 7), (4, 4), "interpolate", "x") == (4, 4)
    tokens = torch.arange(16.0).reshape(1, 4, 4, 1)
    assert pooled(tokens, (2, 2)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert interpolated(tokens, (4, 4)).equal(tokens)


@pytest.mark.parametrize(
    ("teacher", "fit", "words"),
    [
        ((16, 16), "pool", "has 16 x 16 tokens, and the DiT 6 x 6; expected sides that divide, such as 18 x 18"),
        ((16, 16), "exact", "expected the same grid, or fit: pool or interpolate"),
        ((1, 1), "interpolate", "one token for an image cannot be interpolated; expected fit: pool"),
    ],
)
def test_grids_that_do_not_fit_are_refused(teacher: tuple[int, int], fit: Any, words: str):
    with pytest.raises(SpecError, match=words):
        common_grid(teacher, (6, 6), fit, "teacher")


# --- the model and the step


def test_blocks_are_checked_and_have_a_default():
    m = model()
    assert [m.block(None, share, "x") for share in (1 / 4, 8 / 28, 1.0)] == [0, 0, 3]
    assert m.block(3, 0, "x") == 3
    with pytest.raises(SpecError, match="method 'x' uses block 4, and the DiT has blocks 0 to 3"):
        m.block(4, 0, "x")


def test_random_numbers_of_ranks_are_rows_of_those_of_one_device():
    whole = step(rows=4).uniform(3)
    halves = [step(rows=2, part=Part(rank, 2)).uniform(3) for rank in range(2)]
    assert whole.equal(torch.cat(halves))
    assert whole.shape == (4, 3)


def test_a_method_needs_a_second_sample_and_a_bounded_loss():
    for name in ("contrastive", "dispersive"):
        part: Method = specs.build("method", name)
        with pytest.raises(SpecError, match=r"data\.batch is 1; expected at least 2"):
            part.build(model(batch=1))
    with pytest.raises(SpecError, match="the loss has no minimum"):
        specs.build("method", {"name": "contrastive", "weight": 1.0}).build(model())
