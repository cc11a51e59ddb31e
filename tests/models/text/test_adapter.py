"""The layers behind a text encoder: their definition in loops, what trains, what files of weights hold."""

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sana_lab.checkpoints import weights
from sana_lab.checkpoints.build import build
from sana_lab.config import specs
from sana_lab.config.specs import SpecError

SPEC: dict[str, Any] = {"name": "adapter", "encoder": tiny.LLM, "width": 24, "layers": 2, "heads": 3, "rms": 2.0}
SHORT, LONG = "a red circle", "a photo of a blue square and a green triangle"


def adapter(**options: Any) -> Any:
    """An adapter with random weights in place of the initial ones, under which its layers are the identity."""
    part = tiny.build("text_encoder", {**SPEC, **options})
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in part.named_parameters():
            if not name.startswith("encoder."):
                p.copy_(0.3 * torch.randn(p.shape, generator=random) + ("norm" in name))
    return part


def normed(x: Tensor, norm: Any) -> Tensor:
    rows = [row / math.sqrt(sum(float(v) ** 2 for v in row) / len(row) + norm.eps) for row in x]
    return torch.stack(rows) * norm.weight


def gelu(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def by_hand(part: Any, tokens: Tensor) -> Tensor:
    """The features of one prompt's real tokens (L, D), alone and without padding."""
    x = tokens / tokens.square().mean().sqrt() @ part.project.weight.T + part.project.bias
    for layer in part.layers:
        y = normed(x, layer.norm_attention)
        matrices = zip(layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3), strict=True)
        q, k, v = (y @ matrix.T + bias for matrix, bias in matrices)
        mixed, width = torch.zeros_like(x), x.shape[1] // layer.heads
        for at in (slice(first, first + width) for first in range(0, x.shape[1], width)):
            for i in range(len(x)):
                scores = [math.exp(float(q[i, at] @ k[j, at]) / math.sqrt(width)) for j in range(len(x))]
                mixed[i, at] = sum(s / sum(scores) * v[j, at] for j, s in enumerate(scores))
        x = x + mixed @ layer.proj.weight.T + layer.proj.bias
        hidden = normed(x, layer.norm_mlp) @ layer.mlp.expand.weight.T + layer.mlp.expand.bias
        x = x + hidden.clone().apply_(gelu) @ layer.mlp.project.weight.T + layer.mlp.project.bias
    return normed(x, part.norm)


@torch.no_grad()
def test_it_is_its_definition_for_each_prompt_alone():
    """So neither padding nor the other rows of a batch change the features of real tokens."""
    part = adapter().double()
    inner, text = part.encoder([SHORT, LONG, ""]), part([SHORT, LONG, ""])
    assert torch.equal(text.mask, inner.mask)
    assert not text.mask.all()
    for tokens, features, mask in zip(inner.tokens, text.tokens, text.mask, strict=True):
        torch.testing.assert_close(features[mask], by_hand(part, tokens[mask]), atol=1e-6, rtol=0)


@torch.no_grad()
def test_features_are_scaled_first():
    part = tiny.build("text_encoder", SPEC)
    plain, text = part([SHORT]).tokens, part.encoder([SHORT])
    torch.testing.assert_close(plain.square().mean(-1).sqrt(), torch.full((1, 4), 2.0), atol=1e-3, rtol=0)
    part.encoder.forward = lambda prompts: text._replace(tokens=text.tokens * 1000)
    torch.testing.assert_close(part([SHORT]).tokens, plain)  # each prompt's own RMS
    part.input_rms = 1000 * float(text.tokens.square().mean().sqrt())
    torch.testing.assert_close(part([SHORT]).tokens, plain)
    part.encoder.forward = lambda prompts: text
    part.project.bias.fill_(1.0)
    assert not torch.allclose(part([SHORT]).tokens, plain, atol=0.1)  # a thousandth of the given RMS


@pytest.mark.parametrize("name", ["llm", "t5"])
def test_null_conventions_are_those_of_the_inner_encoder(name: str):
    own, theirs = (adapter(encoder={**tiny.LLM, "name": name, "null": null}) for null in ("diffusers", "nvlabs"))
    text, null = own([SHORT, LONG]), own([""])
    assert torch.equal(own.negative([""], text).tokens, null.tokens)
    assert null.mask.all()
    tokens, mask = theirs.negative([""], text)
    assert torch.equal(mask, text.mask)
    assert tokens.shape == text.tokens.shape
    torch.testing.assert_close(tokens[:, :1], null.tokens.expand(2, -1, -1))
    for part in (own, theirs):
        dropped = part.with_dropout([SHORT, LONG], [True, False])
        alone = part([SHORT, LONG])
        torch.testing.assert_close(dropped.tokens[1][alone.mask[1]], alone.tokens[1][alone.mask[1]])
        torch.testing.assert_close(dropped.tokens[0, :1], null.tokens[0])


def test_an_instruction_is_read_in_prompts_and_not_in_negative_ones():
    part = adapter(encoder={**tiny.LLM, "instruction": "draw this: "})
    assert torch.equal(part([SHORT]).mask, part.encoder([SHORT]).mask)
    assert not torch.equal(part([SHORT]).mask, part.without_instruction([SHORT]).mask)
    assert part.negative([SHORT], part([LONG])).tokens.shape[1] == part.without_instruction([SHORT]).tokens.shape[1]


def test_cached_features_equal_those_encoded_anew():
    """A frozen language model keeps its features also while the adapter trains."""
    cached = adapter(encoder={**tiny.LLM, "instruction": "draw this: "}).train()
    plain = adapter(encoder={**tiny.LLM, "instruction": "draw this: ", "cache": False}).train()
    for prompts in ([SHORT, ""], [LONG, SHORT], [SHORT]):
        text, expected = cached(prompts), plain(prompts)
        assert torch.equal(text.mask, expected.mask)
        torch.testing.assert_close(text.tokens[text.mask], expected.tokens[text.mask], atol=1e-5, rtol=1e-5)
    assert cached.encoder.cache is not None
    calls: list[int] = []
    cached.encoder.network.register_forward_hook(lambda *_: calls.append(1))
    cached([SHORT])
    assert calls == []
    cached.clear_cache()
    cached([SHORT])
    assert calls == [1]


def test_a_frozen_encoder_stays_frozen_and_in_evaluation_mode():
    part = adapter().train().requires_grad_(True)
    part([SHORT]).tokens.square().sum().backward()
    grads = {name: p.grad is not None for name, p in part.named_parameters()}
    assert {name.startswith("encoder.") for name, has in grads.items() if not has} == {True}
    assert {name.startswith("encoder.") for name, has in grads.items() if has} == {False}
    assert part.training
    assert not any(m.training for m in part.encoder.modules())
    assert part.frozen == ("encoder",)
    both = adapter(train_encoder=True).train().requires_grad_(True)
    both([SHORT]).tokens.mul(torch.linspace(0, 1, 24)).sum().backward()
    assert all(p.grad is not None for p in both.parameters())
    assert all(m.training for m in both.encoder.modules())
    assert both.frozen == ()
    assert adapter(encoder=SPEC, train_encoder=True).frozen == ("encoder.encoder",)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    """The spec of an adapter with files of weights for it and its encoder, and the tensors of both."""
    inner = tiny.build("text_encoder", tiny.LLM, seed=3).state_dict()
    save_file(inner, tmp_path / "inner.safetensors")
    encoder = {**tiny.LLM, "weights": str(tmp_path / "inner.safetensors")}
    own = {k: v for k, v in adapter().state_dict().items() if not k.startswith("encoder.")}
    save_file({f"text_encoder.{k}": v for k, v in own.items()}, tmp_path / "own.safetensors")
    return {"spec": {**SPEC, "encoder": encoder, "weights": str(tmp_path / "own.safetensors")}, "own": own,
            "inner": inner, "folder": tmp_path}  # fmt: skip


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_file_of_weights_holds_the_adapter_and_the_spec_its_encoder(files):
    part = build("text_encoder", files["spec"])
    assert same(part.encoder.state_dict(), files["inner"])
    assert same({k: v for k, v in part.state_dict().items() if not k.startswith("encoder.")}, files["own"])
    whole = files["folder"] / "whole.safetensors"
    save_file({**part.state_dict(), "encoder.network.norm.weight": torch.ones(32)}, whole)
    again = build("text_encoder", {**files["spec"], "weights": str(whole)})
    assert torch.equal(again.encoder.network.norm.weight, torch.ones(32))  # a file with the encoder counts
    save_file({k: v for k, v in files["own"].items() if k != "norm.weight"}, whole)
    with pytest.raises(SpecError, match=r"norm\.weight is missing"):
        build("text_encoder", {**files["spec"], "weights": str(whole)})


def test_a_system_trains_and_keeps_the_adapter_alone(files):
    system = tiny.text2image(text_encoder=files["spec"])
    assert system.text_trains
    names = [name for name in system.trained() if name.startswith("text_encoder.")]
    assert names == [f"text_encoder.{name}" for name in files["own"]]
    assert [name for name in system.average.values if name.startswith("text_encoder.encoder")] == []
    weights.load_state(system.text_encoder, system.trained(), "text_encoder.", "itself")
    frozen = tiny.text2image(text_encoder=files["spec"], train_text=False)
    assert frozen.frozen == ("autoencoder", "text_encoder")
    assert isinstance(frozen.text_encoder.project, nn.Linear)
    assert not any(p.requires_grad for p in frozen.text_encoder.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "lm"}, "no text_encoder is called 'lm'; did you mean 'llm'"),
        ({"encoder": {"name": "llm", "widht": 8}}, "text_encoder 'llm' has no option 'widht'; did you mean 'width'"),
        ({"layers": 0}, r"layers is 0 \(int\), expected int in \[1, 256\]"),
        ({"heads": 5}, "width 24 is not a multiple of heads 5"),
        ({"width": None, "heads": 5}, "width 32 is not a multiple of heads 5"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str):
    with pytest.raises(SpecError, match=message):
        specs.build("text_encoder", {**SPEC, **options})
