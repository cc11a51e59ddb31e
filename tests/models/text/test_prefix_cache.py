"""What a frozen decoder reads once gives what it gives when it reads everything, and never what it no longer says."""

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
        made: PreTrainedModel = model(config(**sizes, initializer_range=0.3, **options))
        made.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def encoder(folder: Path, name: str = "gemma2", **options: Any) -> Llm:
    given = {"max_tokens": 40, "instruction": INSTRUCTION, **options}
    return Llm(str(folder / name), **given).requires_grad_(False)


def pair(folder: Path, name: str = "gemma2", **options: Any) -> tuple[Llm, Llm]:
    """One that remembers, one that does not."""
    return encoder(folder, name, **options), encoder(folder, name, cache=False, **options)


class Count:
    """Tokens that a network was given, by call."""

    def __init__(self, encoder: Llm) -> None:
        self.calls: list[tuple[int, int]] = []
        encoder.network.register_forward_pre_hook(
            lambda _, args, given: self.calls.append(tuple(given["input_ids"].shape)), with_kwargs=True
        )

    def take(self) -> list[tuple[int, int]]:
        calls, self.calls = self.calls, []
        return calls


def real(text: Text) -> list[Tensor]:
    return [tokens[mask] for tokens, mask in zip(*text, strict=True)]


def assert_same(kept: Text, plain: Text) -> None:
    """float32: 1e-5 of features of order 1, at every real position."""
    assert torch.equal(kept.mask, plain.mask)
    for a, b in zip(real(kept), real(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# --- the same features


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pad_to_max", [False, True])
@torch.no_grad()
def test_the_instruction_read_once_gives_what_reading_it_each_time_gives(folder: Path, name: str, pad_to_max: bool):
    kept, plain = pair(folder, name, pad_to_max=pad_to_max)
    for prompts in (PROMPTS, PROMPTS[::-1], ["another prompt"], [""], PROMPTS[:1]):
        assert_same(kept(prompts), plain(prompts))
    assert kept.cache is not None
    assert kept.cache.prefix is not None
    assert len(kept.cache.prefix.ids) == kept.window_start


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "llama"])
@torch.no_grad()
def test_with_the_attention_that_is_written_out(folder: Path, name: str):
    kept, plain = pair(folder, name)
    for e in (kept, plain):
        e.network.set_attn_implementation("eager")
    assert_same(kept(PROMPTS), plain(PROMPTS))


@torch.no_grad()
def test_a_prompt_that_is_cut_keeps_the_same_positions(folder: Path):
    kept, plain = pair(folder, max_tokens=6)
    with pytest.warns(UserWarning, match="over 6 tokens"):
        assert_same(kept(PROMPTS), plain(PROMPTS))
    with pytest.warns(UserWarning, match="over 6 tokens"):
        kept(PROMPTS[1:2])  # said again, though nothing is read


@pytest.mark.parametrize("instruction", [None, "a photo of a cross", "User Prompt: "])
@torch.no_grad()
def test_without_an_instruction_or_with_a_short_one(folder: Path, instruction: str | None):
    kept, plain = pair(folder, instruction=instruction)
    assert_same(kept(PROMPTS), plain(PROMPTS))


@torch.no_grad()
def test_tokens_that_merge_across_the_border(folder: Path):
    """`sc` + `ene` is the one word `scene`: the rows share fewer tokens than the instruction has."""
    instruction = "Describe the picture in all its many details and then draw the sc"
    kept, plain = pair(folder, instruction=instruction)
    alone = kept._ids(instruction)
    merged, split = kept._ids(instruction + "ene"), kept._ids(instruction + " red")
    assert alone[: len(alone) - 1] == split[: len(alone) - 1]
    assert len(merged) < len(alone)
    for prompts in (["ene"], [" red"], ["ene", " red", "", "ope of stars"]):
        assert_same(kept(prompts), plain(prompts))


@torch.no_grad()
def test_a_prompt_that_does_not_begin_as_the_instruction_does(folder: Path):
    """A tokenizer may give the whole row other tokens; then it is read whole."""
    kept, plain = pair(folder)
    kept(PROMPTS)
    assert kept.cache is not None
    prefix = kept.cache.prefix
    assert prefix is not None
    kept.cache.prefix = prefix._replace(ids=(prefix.ids[0], *[99] * (len(prefix.ids) - 1)))
    kept.cache.prefix_of = lambda network, ids: kept.cache.prefix  # type: ignore[method-assign, union-attr]
    kept.clear_cache()
    assert_same(kept(PROMPTS), plain(PROMPTS))


@pytest.mark.parametrize("null", ["diffusers", "nvlabs"])
@pytest.mark.parametrize(("negatives", "pad_to_max"), [([""], False), ([""], True), (PROMPTS, False)])
@torch.no_grad()
def test_the_null_condition_of_both_conventions(folder: Path, null: Any, pad_to_max: bool, negatives: list[str]):
    """`nvlabs` looks at the features of padding, too."""
    kept, plain = pair(folder, null=null, pad_to_max=pad_to_max)
    for _ in range(2):
        assert_same(kept.negative(negatives, kept(PROMPTS)), plain.negative(negatives, plain(PROMPTS)))
        assert_same(
            kept.with_dropout(PROMPTS, [True, False] * 2 + [True]),
            plain.with_dropout(PROMPTS, [True, False] * 2 + [True]),
        )
    short = kept(PROMPTS[:1])
    assert_same(kept.negative([""], short), plain.negative([""], plain(PROMPTS[:1])))


# --- what is read


@torch.no_grad()
def test_each_thing_is_read_once(folder: Path):
    kept = encoder(folder)
    count, whole = Count(kept), len(kept._ids(INSTRUCTION + PROMPTS[1]))
    text = kept(PROMPTS[:2])
    assert count.take() == [(1, kept.window_start), (2, whole - kept.window_start)]
    kept.negative([""], text)
    assert count.take() == [(1, 1)]
    kept.negative([""], kept(PROMPTS[1::-1]))
    assert count.take() == []
    kept([PROMPTS[0], "a zebra", "a zebra"])
    assert [rows for rows, _ in count.take()] == [1]
    kept.clear_cache()
    kept.negative([""], kept(PROMPTS[:2]))
    assert count.take() == [(2, whole - kept.window_start)], "the instruction and the empty prompt stay"


@torch.no_grad()
def test_the_null_of_nvlabs_is_read_once_for_all_lengths(folder: Path):
    kept = encoder(folder, null="nvlabs")
    texts = [kept(PROMPTS[:1]), kept(PROMPTS[1:2])]
    count = Count(kept)
    for text in texts * 2:
        kept.negative([""], text)
    assert count.take() == [(1, 40)]


@torch.no_grad()
def test_what_is_kept_is_bounded_and_the_last_used_stays(folder: Path):
    kept = encoder(folder)
    names = [f"{i} circles" for i in range(CAPACITY["prompt"])]
    kept(names)
    kept(names[:1])
    count = Count(kept)
    kept(["one more"])
    kept(names[:1])
    assert len(count.take()) == 1
    kept(names[1:2])
    assert len(count.take()) == 1
    assert kept.cache is not None
    assert len(kept.cache.features["prompt"]) == CAPACITY["prompt"]
    many = [f"{i} squares" for i in range(CAPACITY["prompt"] + 5)]
    assert len(kept(many).tokens) == len(many)
    assert len(kept.cache.features["prompt"]) == CAPACITY["prompt"]


@torch.no_grad()
def test_changing_what_was_given_changes_nothing_that_is_kept(folder: Path):
    kept, plain = pair(folder)
    for _ in range(2):
        text = kept(PROMPTS[:1])
        assert_same(text, plain(PROMPTS[:1]))
        text.tokens.zero_()


# --- never what it no longer says


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
    kept, plain = pair(folder)
    before = kept(PROMPTS), kept.negative([""], kept(PROMPTS))
    change(kept), change(plain)
    after = kept(PROMPTS), kept.negative([""], kept(PROMPTS))
    assert_same(after[0], plain(PROMPTS))
    assert_same(after[1], plain.negative([""], plain(PROMPTS)))
    assert before[0].tokens.dtype != after[0].tokens.dtype or not torch.allclose(before[0].tokens, after[0].tokens)


def test_what_trains_is_read_each_time(folder: Path):
    kept = encoder(folder)
    count = Count(kept)
    for _ in range(2):
        kept(PROMPTS[:1])  # gradients are on
    with torch.no_grad():
        kept.train()(PROMPTS[:1])
        kept.eval().requires_grad_(True)(PROMPTS[:1])
        kept.requires_grad_(False)
        with torch.inference_mode():
            kept(PROMPTS[:1])
            kept(PROMPTS[:1])
    assert len({length for _, length in count.take()[:4]}) == 1
    tiny = Llm()
    tiny([PROMPTS[0]]).tokens.sum().backward()
    assert tiny.network.get_input_embeddings().weight.grad is not None


@torch.no_grad()
def test_autocast_is_remembered_apart(folder: Path):
    kept, plain = pair(folder)
    wide = kept(PROMPTS)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(Text(kept(PROMPTS).tokens[:1], kept(PROMPTS).mask[:1]), Text(*(x[:1] for x in kept(PROMPTS))))
        rough = kept(PROMPTS)
    assert not torch.equal(rough.tokens, wide.tokens)
    assert_same(kept(PROMPTS), plain(PROMPTS))


@torch.no_grad()
def test_copies_begin_empty(folder: Path):
    kept = encoder(folder)
    text = kept(PROMPTS)
    for twin in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
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
