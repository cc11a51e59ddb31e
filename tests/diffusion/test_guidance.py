"""Guidance in one batched forward against two forwards, on a tiny DiT."""

import pytest
import tiny
import torch

from sana_lab.diffusion.guidance import guided
from sana_lab.models.dit import Dit
from sana_lab.types import Text


@pytest.fixture(scope="module")
def dit() -> Dit:
    return tiny.dit(dtype=torch.float64)


def text(rows: int, length: int, seed: int) -> Text:
    return tiny.caption([i % length + 1 for i in range(rows)], seed, length)


def noisy() -> tuple[torch.Tensor, torch.Tensor]:
    return tiny.latents(3), torch.tensor([0.1, 0.5, 0.9])


@pytest.mark.parametrize("scale", [0.0, 0.5, 4.5])
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 6), (3, 2), (3, 5), (3, 8)])
@torch.no_grad()
def test_one_batched_forward_is_two(dit: Dit, scale: float, rows: int, length: int):
    """The null text is one row for all or one each, shorter or longer than the prompts."""
    prompts, null, (x, t) = text(3, 5, 1), text(rows, length, 2), noisy()
    every = Text(null.tokens.expand(3, -1, -1), null.mask.expand(3, -1))
    with_text, without = dit(x, t, prompts), dit(x, t, every)
    assert torch.allclose(guided(dit, prompts, null, scale)(x, t), without + scale * (with_text - without))


@torch.no_grad()
def test_a_scale_of_one_is_the_prompt_alone_in_half_the_work(dit: Dit):
    prompts, (x, t), sizes = text(3, 5, 1), noisy(), []
    handle = dit.patch_embed.register_forward_hook(lambda module, given, out: sizes.append(len(out)))
    alone = guided(dit, prompts, text(1, 2, 2), 1.0)(x, t)
    guided(dit, prompts, text(1, 2, 2), 2.0)(x, t)
    handle.remove()
    assert torch.equal(alone, dit(x, t, prompts))
    assert sizes == [3, 6]


@torch.no_grad()
def test_captions_are_prepared_once(dit: Dit):
    calls: list[int] = []
    handle = dit.caption_embed.register_forward_hook(lambda *_: calls.append(1))
    velocity = guided(dit, text(3, 5, 1), text(1, 2, 2), 4.5)
    assert len(calls) == 2, "the prompts', and the null text's"
    for _ in range(4):
        velocity(*noisy())
    handle.remove()
    assert len(calls) == 2


@pytest.mark.parametrize(("t", "rows"), [(0.29, 3), (0.3, 6), (0.5, 6), (0.7, 6), (0.71, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_guidance_within_an_interval_alone(dit: Dit, t: float, rows: int, dtype: torch.dtype):
    """Both ends belong to it, also where float32 lies beside them; outside, the prompt alone in half the work."""
    (prompts, null, x), sizes = (text(3, 5, 1), text(1, 2, 2), noisy()[0]), []
    velocity = guided(dit, prompts, null, 4.5, (0.3, 0.7))
    everywhere, times = guided(dit, prompts, null, 4.5), torch.full((3,), t, dtype=dtype)
    handle = dit.patch_embed.register_forward_hook(lambda module, given, out: sizes.append(len(out)))
    result = velocity(x, times)
    handle.remove()
    assert sizes == [rows]
    expected = everywhere(x, times) if rows == 6 else dit(x, times, prompts)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-14)  # threads may split the prepared text's sums


def test_texts_beside_one_another_have_one_length():
    a, b = text(3, 5, 1), text(1, 2, 2)
    both = a.beside(b)
    assert both.tokens.shape == (6, 5, 12)
    assert torch.equal(both.tokens[:3], a.tokens)
    assert torch.equal(both.mask[:3], a.mask)
    for row in range(3, 6):
        assert torch.equal(both.tokens[row, :2], b.tokens[0])
        assert both.mask[row].tolist() == [*b.mask[0].tolist(), False, False, False]


@pytest.mark.parametrize(("rows", "other_rows", "length"), [(3, 1, 3), (3, 3, 7), (1, 1, 5)])
@torch.no_grad()
def test_prepared_texts_beside_one_another_are_the_joined_text_prepared(
    dit: Dit, rows: int, other_rows: int, length: int
):
    first, other = text(rows, 5, 1), text(other_rows, length, 2)
    both, expected = dit.prepare(first).beside(dit.prepare(other)), dit.prepare(first.beside(other))
    assert (len(both.mask), both.length) == (2 * rows, max(5, length))
    assert torch.equal(both.mask, expected.mask)
    keep = both.mask[:, None, :, None]
    for ours, theirs in zip([*both.keys, *both.values], [*expected.keys, *expected.values], strict=True):
        torch.testing.assert_close(ours * keep, theirs * keep)


def test_padding_to_its_own_length_changes_nothing():
    a = text(3, 5, 1)
    assert torch.equal(a.padded(5).tokens, a.tokens)
    assert torch.equal(a.padded(5).mask, a.mask)
