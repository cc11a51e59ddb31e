"""Cached features of a frozen decoder equal uncached ones, and are dropped when its weights change."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2Model,
    Gemma3TextConfig,
    Gemma3TextModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedModel,
    Qwen3Config,
    Qwen3Model,
)

from sana_lab.models.text.llm import Llm
from sana_lab.models.text.prefix_cache import CAPACITY, causal
from sana_lab.models.text.tokenizer import offline_tokenizer
from sana_lab.types import Text

INSTRUCTION = "Describe the picture in detail.\n- not too long\n- and as it is\nUser Prompt: "
PROMPTS = ["a red circle", "a photo of a blue square left of two green triangles", "", "a zebra", "a red circle"]
SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
MODELS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "gemma2": (Gemma2Config, Gemma2Model, {"query_pre_attn_scalar": 16}),
    "a narrow window": (Gemma2Config, Gemma2Model, {"query_pre_attn_scalar": 16, "sliding_window": 5}),
    "gemma3": (Gemma3TextConfig, Gemma3TextModel, {"query_pre_attn_scalar": 16, "sliding_window": 7}),
    "llama": (LlamaConfig, LlamaModel, {}),
    "qwen3": (Qwen3Config, Qwen3Model, {}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, tokenizer = tmp_path_factory.mktemp("decoders"), offline_tokenizer(start=True)
    torch.manual_seed(0)
    for name, (config, model, options) in MODELS.items():
        sizes = {**SIZE, "vocab_size": len(tokenizer), "num_key_value_heads": 1, "head_dim": 16}
        network: PreTrainedModel = model(config(**sizes, initializer_range=0.3, **options))
        network.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def encoder(folder: Path, name: str = "gemma2", **options: Any) -> Llm:
    return Llm(str(folder / name), **{"max_tokens": 40, "instruction": INSTRUCTION, **options}).requires_grad_(False)


def pair(folder: Path, name: str = "gemma2", **options: Any) -> tuple[Llm, Llm]:
    """An encoder with the cache, and one without."""
    return encoder(folder, name, **options), encoder(folder, name, cache=False, **options)


class Count:
    """Tokens that a network was given, by call."""

    def __init__(self, encoder: Llm) -> None:
        self.calls: list[tuple[int, int]] = []
        encoder.network.register_forward_pre_hook(
            lambda _, args, kwargs: self.calls.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )

    def take(self) -> list[tuple[int, int]]:
        calls, self.calls = self.calls, []
        return calls


def real(text: Text) -> list[Tensor]:
    return [tokens[mask] for tokens, mask in zip(*text, strict=True)]


def assert_same(cached: Text, plain: Text) -> None:
    """float32: 1e-5 of features of order 1, at every real position."""
    assert torch.equal(cached.mask, plain.mask)
    for a, b in zip(real(cached), real(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# --- the same features


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pad_to_max", [False, True])
@torch.no_grad()
def test_the_instruction_read_once_gives_what_reading_it_each_time_gives(folder: Path, name: str, pad_to_max: bool):
    cached, plain = pair(folder, name, pad_to_max=pad_to_max)
    for prompts in (PROMPTS, PROMPTS[::-1], ["another prompt"], [""], PROMPTS[:1]):
        assert_same(cached(prompts), plain(prompts))
    assert cached.cache is not None
    assert cached.cache.prefix is not None
    assert len(cached.cache.prefix.ids) == cached.window_start


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "llama"])
@torch.no_grad()
def test_with_the_attention_that_is_written_out(folder: Path, name: str):
    cached, plain = pair(folder, name)
    for e in (cached, plain):
        e.network.set_attn_implementation("eager")
    assert_same(cached(PROMPTS), plain(PROMPTS))


@torch.no_grad()
def test_a_prompt_that_is_cut_keeps_the_same_positions(folder: Path):
    cached, plain = pair(folder, max_tokens=6)
    with pytest.warns(UserWarning, match="over 6 tokens"):
        assert_same(cached(PROMPTS), plain(PROMPTS))
    with pytest.warns(UserWarning, match="over 6 tokens"):
        cached(PROMPTS[1:2])  # warned again, although nothing is encoded


@pytest.mark.parametrize("instruction", [None, "a photo of a cross", "User Prompt: "])
@torch.no_grad()
def test_without_an_instruction_or_with_a_short_one(folder: Path, instruction: str | None):
    cached, plain = pair(folder, instruction=instruction)
    assert_same(cached(PROMPTS), plain(PROMPTS))


@torch.no_grad()
def test_tokens_that_merge_across_the_border(folder: Path):
    """`sc` + `ene` is the one word `scene`: the rows share fewer tokens than the instruction has."""
    instruction = "Describe the picture in all its many details and then draw the sc"
    cached, plain = pair(folder, instruction=instruction)
    alone = cached._ids(instruction)
    merged, split = cached._ids(instruction + "ene"), cached._ids(instruction + " red")
    assert alone[: len(alone) - 1] == split[: len(alone) - 1]
    assert len(merged) < len(alone)
    for prompts in (["ene"], [" red"], ["ene", " red", "", "ope of stars"]):
        assert_same(cached(prompts), plain(prompts))


@torch.no_grad()
def test_a_prompt_that_does_not_begin_as_the_instruction_does(folder: Path):
    """A tokenizer may give the whole row other tokens; then it is read whole."""
    cached, plain = pair(folder)
    cached(PROMPTS)
    assert cached.cache is not None
    prefix = cached.cache.prefix
    assert prefix is not None
    cached.cache.prefix = prefix._replace(ids=(prefix.ids[0], *[99] * (len(prefix.ids) - 1)))
    cached.cache.prefix_of = lambda network, ids: cached.cache.prefix  # type: ignore[method-assign, union-attr]
    cached.clear_cache()
    assert_same(cached(PROMPTS), plain(PROMPTS))


@pytest.mark.parametrize("null", ["diffusers", "nvlabs"])
@pytest.mark.parametrize(("negatives", "pad_to_max"), [([""], False), ([""], True), (PROMPTS, False)])
@torch.no_grad()
def test_the_null_condition_of_both_conventions(folder: Path, null: Any, pad_to_max: bool, negatives: list[str]):
    """`nvlabs` looks at the features of padding, too."""
    cached, plain = pair(folder, null=null, pad_to_max=pad_to_max)
    for _ in range(2):
        assert_same(cached.negative(negatives, cached(PROMPTS)), plain.negative(negatives, plain(PROMPTS)))
        assert_same(
            cached.with_dropout(PROMPTS, [True, False] * 2 + [True]),
            plain.with_dropout(PROMPTS, [True, False] * 2 + [True]),
        )
    short = cached(PROMPTS[:1])
    assert_same(cached.negative([""], short), plain.negative([""], plain(PROMPTS[:1])))


# --- what is encoded


@torch.no_grad()
def test_each_thing_is_read_once(folder: Path):
    cached = encoder(folder)
    count, whole = Count(cached), len(cached._ids(INSTRUCTION + PROMPTS[1]))
    text = cached(PROMPTS[:2])
    assert count.take() == [(1, cached.window_start), (2, whole - cached.window_start)]
    cached.negative([""], text)
    assert count.take() == [(1, 1)]
    cached.negative([""], cached(PROMPTS[1::-1]))
    assert count.take() == []
    cached([PROMPTS[0], "a zebra", "a zebra"])
    assert [rows for rows, _ in count.take()] == [1]
    cached.clear_cache()
    cached.negative([""], cached(PROMPTS[:2]))
    assert count.take() == [(2, whole - cached.window_start)], "the instruction and the empty prompt stay"


@torch.no_grad()
def test_the_null_of_nvlabs_is_read_once_for_all_lengths(folder: Path):
    cached = encoder(folder, null="nvlabs")
    texts = [cached(PROMPTS[:1]), cached(PROMPTS[1:2])]
    count = Count(cached)
    for text in texts * 2:
        cached.negative([""], text)
    assert count.take() == [(1, 40)]


@torch.no_grad()
def test_what_is_kept_is_bounded_and_the_last_used_stays(folder: Path):
    cached = encoder(folder)
    names = [f"{i} circles" for i in range(CAPACITY["prompt"])]
    cached(names)
    cached(names[:1])
    count = Count(cached)
    cached(["one more"])
    cached(names[:1])
    assert len(count.take()) == 1
    cached(names[1:2])
    assert len(count.take()) == 1
    assert cached.cache is not None
    assert len(cached.cache.features["prompt"]) == CAPACITY["prompt"]
    many = [f"{i} squares" for i in range(CAPACITY["prompt"] + 5)]
    assert len(cached(many).tokens) == len(many)
    assert len(cached.cache.features["prompt"]) == CAPACITY["prompt"]


@torch.no_grad()
def test_changing_what_was_given_changes_nothing_that_is_kept(folder: Path):
    cached, plain = pair(folder)
    for _ in range(2):
        text = cached(PROMPTS[:1])
        assert_same(text, plain(PROMPTS[:1]))
        text.tokens.zero_()


# --- invalidation


def change_in_place(e: Llm) -> None:
    e.network.layers[0].mlp.up_proj.weight.mul_(2)


def change_state(e: Llm) -> None:
    e.load_state_dict({k: v * 1.5 for k, v in e.state_dict().items()})


def change_assigned(e: Llm) -> None:
    e.load_state_dict({k: v * 1.5 for k, v in e.state_dict().items()}, assign=True)


def change_data(e: Llm) -> None:
    weight = e.network.layers[0].mlp.up_proj.weight
    weight.data = weight.data * 2


def change_training(e: Llm) -> None:
    """One step by a `data` that counts no change."""
    e.requires_grad_(True)
    with torch.enable_grad():
        e(PROMPTS)
    e.network.layers[0].mlp.up_proj.weight.data.mul_(2)
    e.requires_grad_(False)


def change_dtype(e: Llm) -> None:
    e.to(torch.float64)


@pytest.mark.parametrize(
    "change", [change_in_place, change_state, change_assigned, change_data, change_training, change_dtype]
)
@torch.no_grad()
def test_other_weights_are_read_anew(folder: Path, change: Any):
    cached, plain = pair(folder)
    before = cached(PROMPTS), cached.negative([""], cached(PROMPTS))
    change(cached), change(plain)
    after = cached(PROMPTS), cached.negative([""], cached(PROMPTS))
    assert_same(after[0], plain(PROMPTS))
    assert_same(after[1], plain.negative([""], plain(PROMPTS)))
    assert before[0].tokens.dtype != after[0].tokens.dtype or not torch.allclose(before[0].tokens, after[0].tokens)


def test_what_trains_is_read_each_time(folder: Path):
    cached = encoder(folder)
    count = Count(cached)
    for _ in range(2):
        cached(PROMPTS[:1])  # gradients are on
    with torch.no_grad():
        cached.train()(PROMPTS[:1])
        cached.eval().requires_grad_(True)(PROMPTS[:1])
        cached.requires_grad_(False)
        with torch.inference_mode():
            cached(PROMPTS[:1])
            cached(PROMPTS[:1])
    assert len({length for _, length in count.take()[:4]}) == 1
    tiny = Llm()
    tiny([PROMPTS[0]]).tokens.sum().backward()
    assert tiny.network.get_input_embeddings().weight.grad is not None


@torch.no_grad()
def test_autocast_is_remembered_apart(folder: Path):
    cached, plain = pair(folder)
    wide = cached(PROMPTS)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(Text(cached(PROMPTS).tokens[:1], cached(PROMPTS).mask[:1]), Text(*(x[:1] for x in cached(PROMPTS))))
        rough = cached(PROMPTS)
    assert not torch.equal(rough.tokens, wide.tokens)
    assert_same(cached(PROMPTS), plain(PROMPTS))


@torch.no_grad()
def test_copies_begin_empty(folder: Path):
    cached = encoder(folder)
    text = cached(PROMPTS)
    for twin in (copy.deepcopy(cached), pickle.loads(pickle.dumps(cached))):
        assert twin.cache is not None
        assert not twin.cache.features["prompt"]
        assert_same(twin(PROMPTS), text)


def test_decoders_that_look_ahead_or_keep_a_state_are_read_whole():
    plain = Gemma2Config(**SIZE)
    assert causal(plain)
    assert causal(LlamaConfig(**SIZE))
    assert not causal(Gemma3TextConfig(**SIZE, use_bidirectional_attention=True))
    plain.layer_types = ["full_attention", "linear_attention", "full_attention", "full_attention"]
    assert not causal(plain)
