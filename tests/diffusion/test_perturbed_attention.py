"""Perturbed-attention guidance in one batched forward against separate forwards of a DiT changed by hand."""

import copy
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from sana_lab.config import experiments, hashing, schema, specs
from sana_lab.config.specs import SpecError
from sana_lab.diffusion.guidance import guided
from sana_lab.diffusion.perturbed_attention import Perturbation
from sana_lab.diffusion.sampling import Sampling
from sana_lab.diffusion.step_cache import CachedSteps
from sana_lab.models.dit import Dit, TextDit
from sana_lab.types import Text

DEPTH, ROWS = 4, 3
PROMPTS = tiny.caption([5, 9, 2])
NULLS = {"one token": tiny.caption([1], 3), "negative prompt": tiny.caption([4], 3), "each": tiny.caption([5, 2, 3], 3)}
MIXERS: dict[str, Any] = {"softmax": {"name": "softmax", "head_dim": 8}, "linear": {"name": "linear", "head_dim": 8}}


def dit(attention: Any = MIXERS["linear"]) -> Dit:
    model: Dit = tiny.dit(dtype=torch.float64, depth=DEPTH, attention=attention)
    return model


def perturbed(model: Dit, layers: list[int]) -> Dit:
    """A copy whose blocks have the value in place of the mixing, by a hook on what is mixed."""
    changed = copy.deepcopy(model)
    for i in layers:
        attention = changed.blocks[i].attention
        attention.mix_fused = lambda qkv: qkv.unbind(2)[2]
    return changed


def noisy(t: float = 0.5) -> tuple[Tensor, Tensor]:
    return tiny.latents(ROWS), torch.full((ROWS,), t)


def every(text: Text) -> Text:
    return Text(text.tokens.expand(ROWS, -1, -1), text.mask.expand(ROWS, -1))


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("null", NULLS)
@pytest.mark.parametrize("layers", [None, [0], [1, 3]])
@torch.no_grad()
def test_one_batched_forward_is_three(mixer: str, null: str, layers: list[int] | None):
    model, (x, t) = dit(MIXERS[mixer]), noisy()
    text, without = model(x, t, PROMPTS), model(x, t, every(NULLS[null]))
    identity = perturbed(model, [DEPTH // 2] if layers is None else layers)(x, t, PROMPTS)
    expected = without + 3 * (text - without) + 2 * (text - identity)
    result = guided(model, PROMPTS, NULLS[null], 3.0, pag=Perturbation(2.0, layers))(x, t)
    assert (text - identity).abs().max() > 1e-6, "the perturbation changes nothing"
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_without_guidance_and_outside_its_interval_two_rows_are_left():
    model, rows = dit(), list[int]()
    (x, t), pag = noisy(0.2), Perturbation(2.0)
    text = model(x, t, PROMPTS)
    expected = text + 2 * (text - perturbed(model, [2])(x, t, PROMPTS))
    handle = model.patch_embed.register_forward_hook(lambda module, given, out: rows.append(len(out)))
    alone = guided(model, PROMPTS, NULLS["each"], 1.0, pag=pag)(x, t)
    interval = guided(model, PROMPTS, NULLS["each"], 3.0, (0.5, 1.0), pag=pag)
    outside = interval(x, t)
    interval(*noisy(0.7))
    handle.remove()
    assert rows == [2 * ROWS, 2 * ROWS, 3 * ROWS]
    torch.testing.assert_close(alone, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(outside, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mixer", MIXERS)
@torch.no_grad()
def test_one_token_alone_is_mixed_with_nothing(mixer: str):
    """Where there is one token, attention is the identity: both paths agree."""
    attention = tiny.build("attention", MIXERS[mixer], dim=32).double()
    x = torch.randn(3, 1, 1, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(attention.unmixed(x), attention(x), rtol=1e-5, atol=1e-6)
    x = torch.randn(3, 2, 2, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert tiny.error(attention.unmixed(x), attention(x)) > 0.1


@torch.no_grad()
def test_a_step_cache_that_computes_everything_gives_the_same():
    model, (x, t) = dit(), noisy()
    for null in NULLS.values():
        expected = guided(model, PROMPTS, null, 3.0, pag=Perturbation(2.0))(x, t)
        for threshold in (0.0, 1e9):
            cached = guided(
                model,
                PROMPTS,
                null,
                3.0,
                pag=Perturbation(2.0),
                bind=lambda m, limit=threshold: CachedSteps(
                    specs.build("cache", {"name": "first_block", "threshold": limit}), m
                ),
            )
            torch.testing.assert_close(cached(x, t), expected, rtol=0, atol=1e-12)


def test_a_recorded_step_of_another_guidance_is_not_replayed():
    """Same tensors, other computation: `variant` keeps them apart."""
    model = dit().prepare(PROMPTS)
    two, three = (Perturbation(1.0, [i]).before(model) for i in (2, 3))
    assert two.variant == Perturbation(9.0, [2]).before(model).variant
    assert len({model.variant, model.beside(model).variant, two.variant, three.variant}) == 3
    assert two.variant != two.beside(dit().prepare(NULLS["one token"])).variant


def test_what_pag_does_not_go_with():
    with pytest.raises(SpecError, match=r"pag_layers has block 7 of a DiT of 4, expected 0 to 3; the nearest is 3"):
        guided(dit(), PROMPTS, NULLS["each"], 3.0, pag=Perturbation(1.0, [7]))
    with pytest.raises(ValueError, match=r"pag_layers is \[1\], and pag is 0; expected pag above 0"):
        Sampling(pag_layers=[1])
    with pytest.raises(ValueError, match=r"pag_layers is \[\], and pag is 3; expected at least one block, or null"):
        Sampling(pag=3.0, pag_layers=[])
    with pytest.raises(SpecError, match="pag needs a denoiser of blocks"):
        Perturbation(1.0).before(TextDit(dit(), PROMPTS))
    gated = guided(dit("mean"), PROMPTS, NULLS["each"], 3.0, pag=Perturbation(1.0))
    assert torch.isfinite(gated(*noisy())).all(), "the mean's values are there to take"
    with pytest.raises(SpecError, match=r"which its ConvMixer does not offer; expected sampling.pag 0"):
        guided(dit("conv"), PROMPTS, NULLS["each"], 3.0, pag=Perturbation(1.0))
    with pytest.raises(SpecError, match=r"block 2 .* which its ConvMixer does not offer; .*pag_layers of \[1, 3\]"):
        guided(dit(["conv", "mean"]), PROMPTS, NULLS["each"], 3.0, pag=Perturbation(1.0))
    with pytest.raises(SpecError, match="pag is -1"):
        experiments.check_sampling({"pag": -1.0})


def test_pag_is_a_trial_of_its_own_of_the_same_model():
    plain, changed = (experiments.load("shapes_sana", o) for o in ([], ["sampling.pag=2"]))
    assert hashing.experiment_hash(plain) == hashing.experiment_hash(changed)
    assert len({hashing.trial_hash(schema.Trial({}, 0, e)) for e in (plain, changed)}) == 2
    earlier = {
        k: v for k, v in plain["sampling"].items() if k not in ("pag", "pag_layers", "regions", "best_of", "best_by")
    }
    keys = {hashing.trial_hash(schema.Trial({}, 0, {**plain, "sampling": s})) for s in (earlier, plain["sampling"])}
    assert len(keys) == 1, "the hash of results before there was the option"
