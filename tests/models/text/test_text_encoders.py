"""The contract of every text encoder of the table, on the tiny networks that train with the DiT."""

import copy
import re
import warnings

import pytest
import torch

from sana_lab.config import registry, specs
from sana_lab.models.text import PromptTruncated, TextEncoder

SHORT, LONG = "a red circle", "a photo of a blue square, a green triangle and a zebra left of the helicopter"
NAMES = sorted(
    {*registry.TABLE["text_encoder"]} - {"label", "adapter"}
)  # no text, no network; test_label, test_adapter


@pytest.fixture(params=NAMES)
def encoder(request: pytest.FixtureRequest) -> TextEncoder:
    torch.manual_seed(0)
    return specs.build("text_encoder", request.param)


def test_shapes_and_right_padding(encoder: TextEncoder) -> None:
    text = encoder([SHORT, LONG, ""])
    length = text.mask.shape[1]
    assert text.tokens.shape == (3, length, encoder.dim)
    assert text.tokens.dtype == torch.float32
    assert text.mask.dtype == torch.bool
    assert 1 == text.mask[2].sum() < text.mask[0].sum() < text.mask[1].sum() == length
    assert torch.equal(text.mask, text.mask.sort(1, descending=True).values)


def test_it_trains_and_says_so(encoder: TextEncoder) -> None:
    assert not encoder.pretrained
    text = encoder([SHORT, LONG])
    (text.tokens * text.mask[..., None] * torch.randn_like(text.tokens)).sum().backward()
    assert all(p.requires_grad and p.grad is not None and p.grad.any() for p in encoder.parameters())


def test_gradient_reaches_the_embeddings_of_the_words_that_were_used(encoder: TextEncoder) -> None:
    (encoder([SHORT]).tokens.square() * torch.linspace(0, 1, encoder.dim)).sum().backward()
    used = encoder.network.get_input_embeddings().weight.grad.abs().sum(1).nonzero().flatten()
    assert used.tolist() == sorted(encoder.tokenizer([SHORT])["input_ids"][0])


def test_padding_does_not_change_the_features_of_real_tokens(encoder: TextEncoder) -> None:
    alone, padded = encoder([SHORT]), encoder([LONG, SHORT])
    assert torch.equal(padded.mask[1].nonzero(), alone.mask[0].nonzero())
    torch.testing.assert_close(padded.tokens[1][padded.mask[1]], alone.tokens[0], rtol=0, atol=1e-5)


def test_padding_to_the_longest_length_changes_nothing_either(encoder: TextEncoder) -> None:
    name = encoder.spec["name"]
    fixed = specs.build("text_encoder", {"name": name, "max_tokens": 40, "pad_to_max": True})
    fixed.load_state_dict(encoder.state_dict())
    (tokens, mask), short = fixed([SHORT, LONG]), encoder([SHORT, LONG])
    assert tokens.shape == (2, 40, encoder.dim)
    torch.testing.assert_close(tokens[mask], short.tokens[short.mask], rtol=0, atol=1e-5)


def test_words_change_features_and_features_know_their_neighbours(encoder: TextEncoder) -> None:
    a, b = encoder(["a red circle"]).tokens[0], encoder(["a blue circle"]).tokens[0]
    here = encoder.tokenizer(["a red circle"])["input_ids"][0]
    circle = here.index(encoder.tokenizer.convert_tokens_to_ids("Ġcircle"))
    assert (a - b).abs()[circle].max() > 1e-3


def test_the_null_condition_is_the_empty_prompt(encoder: TextEncoder) -> None:
    null = encoder([""])
    assert null.tokens.shape == (1, 1, encoder.dim)
    assert null.mask.all()


def test_long_prompts_are_cut_and_that_is_said(encoder: TextEncoder) -> None:
    short = specs.build("text_encoder", {"name": encoder.spec["name"], "max_tokens": 6})
    with pytest.warns(PromptTruncated, match=r"over 300 tokens .*: \d+ of prompt 0$"):
        assert encoder([LONG * 50]).mask.sum() == encoder.max_tokens == 300
    over = len(encoder.tokenizer([LONG])["input_ids"][0]) - 6
    with pytest.warns(PromptTruncated, match=f"over 6 tokens .*: {over} of prompt 0, {over} of prompt 2$") as caught:
        assert short([LONG, SHORT, LONG]).tokens.shape == (3, 6, encoder.dim)
    assert len(caught) == 1


def test_a_prompt_of_just_the_limit_is_whole(encoder: TextEncoder) -> None:
    whole = encoder([LONG]).mask.sum()
    fitting = specs.build("text_encoder", {"name": encoder.spec["name"], "max_tokens": int(whole)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitting([LONG])


def test_a_training_on_long_captions_is_not_told_forever(encoder: TextEncoder) -> None:
    short = specs.build("text_encoder", {"name": encoder.spec["name"], "max_tokens": 6})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(20):
            short([LONG] * 7)
    assert len(caught) == 8
    assert "and of 2 more" in str(caught[0].message)
    assert str(caught[-1].message).endswith("not reported")


@pytest.mark.parametrize("name", NAMES)
def test_null_conventions(name: str) -> None:
    """diffusers: the null prompt's own mask. NVlabs: the prompt's, over the features of padding too."""
    encoders = []
    for null in ("diffusers", "nvlabs"):
        torch.manual_seed(0)
        encoders.append(specs.build("text_encoder", {"name": name, "null": null}))
    own, theirs = encoders
    text, plain = own([SHORT, LONG]), own([""])
    assert torch.equal(own.negative([""], text).tokens, plain.tokens)
    assert torch.equal(own.negative([""], text).mask, plain.mask)
    tokens, mask = theirs.negative([""], text)
    assert torch.equal(mask, text.mask)
    assert tokens.shape == text.tokens.shape
    ids = own.tokenizer([""], padding="max_length", max_length=tokens.shape[1], return_tensors="pt")
    by_hand = own.network(input_ids=ids.input_ids, attention_mask=ids.attention_mask).last_hidden_state
    torch.testing.assert_close(tokens, by_hand.expand(2, -1, -1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_dropped_prompts_are_the_null_condition_of_each_convention(name: str) -> None:
    own, theirs = (specs.build("text_encoder", {"name": name, "null": null}) for null in ("diffusers", "nvlabs"))
    tokens, mask = own.with_dropout([SHORT, LONG], [True, False])
    assert torch.equal(tokens, own(["", LONG]).tokens)
    assert torch.equal(mask, own(["", LONG]).mask)
    text = theirs([SHORT, LONG])
    tokens, mask = theirs.with_dropout([SHORT, LONG], [True, False])
    assert torch.equal(mask, text.mask)
    assert torch.equal(tokens[1], text.tokens[1])
    assert torch.equal(tokens[0], theirs.negative([""], text).tokens[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_long_negative_prompt_under_a_short_mask(name: str) -> None:
    encoder = specs.build("text_encoder", {"name": name, "null": "nvlabs"})
    text = encoder([SHORT, "red"])
    tokens, mask = encoder.negative([LONG], text)
    assert (tokens.shape, torch.equal(mask, text.mask)) == (text.tokens.shape, True)


def test_later_options_leave_earlier_models_their_hash(encoder: TextEncoder) -> None:
    assert not {"null", "lowercase"} & specs.canonical("text_encoder", encoder.spec["name"]).keys()


def test_configurations_saved_before_options_were_renamed_still_load(encoder: TextEncoder) -> None:
    spec = {"name": encoder.spec["name"], "drawn": False}
    assert specs.resolve("text_encoder", spec) == encoder.spec


def test_state_dict_round_trip(encoder: TextEncoder) -> None:
    other = specs.build("text_encoder", encoder.spec)
    assert not torch.equal(other([LONG]).tokens, encoder([LONG]).tokens)
    other.load_state_dict(encoder.state_dict())
    assert torch.equal(other([LONG]).tokens, encoder([LONG]).tokens)
    pointers = [v.data_ptr() for v in encoder.state_dict().values()]
    assert len(set(pointers)) == len(pointers), "one tensor under two names: safetensors refuses it"


def test_the_same_seed_gives_the_same_weights_and_a_copy_is_equal(encoder: TextEncoder) -> None:
    torch.manual_seed(0)
    again = specs.build("text_encoder", encoder.spec)
    for twin in (again, copy.deepcopy(encoder)):
        assert torch.equal(twin([LONG]).tokens, encoder([LONG]).tokens)


def test_training_and_evaluation_mode_agree(encoder: TextEncoder) -> None:
    assert torch.equal(encoder.train()([LONG]).tokens, encoder.eval()([LONG]).tokens)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "there are no prompts"),
        ("a red circle", "did you mean ['a red circle']?"),
        (["a", None], "prompt 1 is None (NoneType), expected text"),
        ([b"a"], "prompt 0 is b'a' (bytes)"),
        (["\ud800"], "not valid Unicode"),
    ],
)
def test_prompts_that_are_not_texts(encoder: TextEncoder, prompts: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        encoder(prompts)  # type: ignore[arg-type]


def test_sizes_are_options(encoder: TextEncoder) -> None:
    name = encoder.spec["name"]
    wide = specs.build("text_encoder", {"name": name, "width": 48, "layers": 1, "heads": 4, "dtype": "bfloat16"})
    text = wide([SHORT])
    assert (wide.dim, text.tokens.shape[-1], text.tokens.dtype) == (48, 48, torch.bfloat16)
    assert sum(p.numel() for p in wide.parameters()) < sum(p.numel() for p in encoder.parameters())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("options", "message"),
    [({"width": 50, "heads": 4}, "width 50"), ({"max_tokens": 1}, "max_tokens is 1"), ({"dtype": "half"}, "dtype")],
)
def test_options_that_cannot_be(name: str, options: dict, message: str) -> None:
    with pytest.raises(specs.SpecError, match=message):
        specs.build("text_encoder", {"name": name, **options})


@pytest.mark.parametrize("name", NAMES)
def test_on_the_meta_device(name: str) -> None:
    with torch.device("meta"):
        assert all(p.is_meta for p in specs.build("text_encoder", name).parameters())
