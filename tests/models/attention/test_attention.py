"""Attentions that differ in the mixing alone: one contract, naive loops, and a new one in one line."""

import math
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

from sana_lab.config import experiments, registry, schema, specs
from sana_lab.config.specs import SpecError, build
from sana_lab.models.attention import Attention
from sana_lab.models.attention.linear import LinearAttention
from sana_lab.training import checks

NAMES = ["linear", "mean", "softmax"]
NORMED = [(name, qk_norm) for name in NAMES for qk_norm in (False, True) if not (name == "mean" and qk_norm)]


def make(name: str, dim: int = 24, **options: object) -> Attention:
    torch.manual_seed(0)
    options = {k: v for k, v in options.items() if k != "qk_norm" or name != "mean"}  # the mean has no q and k to norm
    return build("attention", {"name": name, "head_dim": 8, **options}, dim=dim)


def qkv(attention: Attention, x: Tensor) -> tuple[Tensor, ...]:
    """(B, N, H, D) each, by the definition: one projection without bias, optional norms over the full width, heads."""
    q, k, v = (x.flatten(1, 2) @ attention.qkv.weight.T).chunk(3, -1)
    q, k = attention.norm_q(q), attention.norm_k(k)
    return tuple(a.unflatten(-1, (attention.heads, -1)) for a in (q, k, v))


def naive(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Token by token, head by head."""
    out = torch.empty_like(v)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for i in range(q.shape[1]):
                if name == "softmax":
                    weights = torch.stack(
                        [(q[b, i, h] @ k[b, j, h] / math.sqrt(q.shape[-1])).exp() for j in range(k.shape[1])]
                    )
                elif name == "mean":
                    weights = torch.ones(k.shape[1], dtype=k.dtype)
                else:
                    weights = torch.stack([q[b, i, h].relu() @ k[b, j, h].relu() for j in range(k.shape[1])])
                out[b, i, h] = (weights[:, None] * v[b, :, h]).sum(0) / (weights.sum() + 1e-8 * (name == "linear"))
    return out


# --- the contract of pure mixing: same parameters, other mixing


@pytest.mark.parametrize(("name", "qk_norm"), NORMED)
def test_all_share_parameters_and_keys(name: str, qk_norm: bool):
    ours, first = make(name, qk_norm=qk_norm), make("linear", qk_norm=qk_norm)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in first.state_dict().items()}
    ours.load_state_dict(first.state_dict())
    assert sum(p.numel() for p in ours.parameters()) == 24 * 24 * 4 + 24 + 48 * qk_norm


@pytest.mark.parametrize("name", NAMES)
def test_same_options_but_for_the_mixing(name: str):
    """Head width, biases and norms default to the same, so that a swap changes the mixing alone."""
    resolved = specs.resolve("attention", name)
    assert (resolved["head_dim"], resolved.get("qk_norm", False)) == (32, False)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_a_set(name: str):
    """Attention alone knows no positions: permuting the tokens permutes the output."""
    attention, x = make(name).double(), torch.randn(1, 1, 6, 24, dtype=torch.float64)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert torch.allclose(attention(x[:, :, order]), attention(x)[:, :, order])


# --- softmax and linear


@pytest.mark.parametrize("name", ["softmax", "linear"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_mixing_is_a_naive_loop(name: str, qk_norm: bool):
    attention = make(name, qk_norm=qk_norm).double()
    x = torch.randn(2, 2, 3, 24, dtype=torch.float64)
    mixed = naive(name, *qkv(attention, x)).flatten(2)
    expected = mixed @ attention.proj.weight.T + attention.proj.bias
    assert torch.allclose(attention(x), expected.view_as(x), rtol=1e-9, atol=1e-12)


def test_linear_of_nothing_positive_is_nothing():
    """Where no key is positive the normaliser is eps alone, and the output 0, not NaN."""
    v = torch.randn(1, 5, 3, 8)
    out = make("linear").mix(torch.rand(1, 5, 3, 8), -torch.rand(1, 5, 3, 8), v)
    assert torch.equal(out, torch.zeros_like(v))


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_takes_the_projection_whole_and_changes_no_bit(dtype: torch.dtype, qk_norm: bool):
    """On the CPU: what the interface makes of norms and `mix`, and its gradients."""
    attention, x = make("linear", qk_norm=qk_norm).to(dtype), torch.randn(2, 3, 4, 24, dtype=dtype)
    results = []
    for mix in (LinearAttention.mix_fused, Attention.mix_fused):
        out = mix(attention, attention.qkv(x).flatten(1, 2).unflatten(-1, (3, 3, 8)))
        results.append([out, *torch.autograd.grad(out.square().sum(), [attention.qkv.weight])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_linear_keeps_norms_that_are_not_ours():
    attention, x = make("linear", qk_norm=True), torch.randn(1, 2, 3, 24)
    attention.norm_q = torch.nn.LayerNorm(24)
    q, k, v = qkv(attention, x)
    expected = attention.proj(naive("linear", q, k, v).flatten(2))
    assert torch.allclose(attention(x), expected.view_as(x), atol=1e-5)


def test_a_head_that_the_kernel_does_not_take_is_refused_at_once():
    with pytest.raises(SpecError, match="backend 'triton' needs a head width of at most 128, not 192; backend 'torch'"):
        make("linear", dim=192, head_dim=192, backend="triton")


def test_backends_are_one_attention():
    x = torch.randn(1, 4, 4, 24)
    assert torch.equal(make("linear", backend="torch")(x), make("linear")(x))


# --- one file and one line

NEW = '''
"""Every feature a head of its own, and cosine similarity: linear in the number of tokens."""

from typing import final

from torch import Tensor
from torch.nn.functional import normalize

from sana_lab.models.attention import Attention
from sana_lab.models.attention.linear import LinearAttention


@final
class Cosine(Attention):
    """q_i * mean_j (k_j * v_j), q and k of length 1, feature by feature."""

    def __init__(self, head_dim: int = 32, qk_norm: bool = False, gain: float = 1.0, *, dim: int) -> None:
        super().__init__(dim, head_dim, qk_norm)
        self.gain = gain

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state = (normalize(k, dim=-1) * v).mean(1, keepdim=True)
        return self.gain * normalize(q, dim=-1) * state
'''


@pytest.fixture
def cosine(here: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """One file, beside the user's experiments."""
    (here / "own_attention.py").write_text(NEW)
    monkeypatch.syspath_prepend(here)
    return "own_attention:Cosine"


def dit_of(experiment: schema.Config) -> torch.nn.Module:
    torch.manual_seed(0)
    return build("dit", experiment["system"]["dit"], channels=4, text_dim=16)


def run(dit: torch.nn.Module) -> Tensor:
    from sana_lab.types import Text

    torch.manual_seed(1)
    text = Text(torch.randn(2, 3, 16), torch.ones(2, 3, dtype=torch.bool))
    return dit(torch.randn(2, 4, 4, 4), torch.tensor([0.2, 0.8]), text)


def test_a_new_attention_in_one_file(here: Path, cosine: str):
    """From YAML by `module:Class`, its options checked like anyone's."""
    tiny.write_experiment(here, "mine", changes={"system.dit.attention": {"name": cosine, "gain": 2}})
    experiment = experiments.load("mine")
    checks.check(experiment)
    dit = dit_of(experiment)
    assert type(dit.blocks[0].attention).__name__ == "Cosine"
    assert dit.blocks[0].attention.gain == 2.0
    run(dit).square().sum().backward()
    assert all(p.grad is not None for p in dit.parameters())
    with pytest.raises(SpecError, match=r"has no option 'gan'; did you mean 'gain'\?"):
        experiments.load("mine", ["system.dit.attention.gan=2"])


def test_a_new_attention_in_one_line(here: Path, cosine: str, monkeypatch):
    """With a line in the table it has a name, and the same weights, keys and results as by its path."""
    monkeypatch.setitem(registry.TABLE["attention"], "cosine", cosine)
    tiny.write_experiment(here, "mine", changes={"system.dit.attention": "cosine"})
    named, softmax = experiments.load("mine"), experiments.load("mine", ["system.dit.attention=softmax"])
    by_path = experiments.load("mine", [f"system.dit.attention={cosine}"])
    assert torch.equal(run(dit_of(named)), run(dit_of(by_path)))
    assert not torch.allclose(run(dit_of(named)), run(dit_of(softmax)))
    assert dit_of(named).state_dict().keys() == dit_of(softmax).state_dict().keys()
    with pytest.raises(SpecError, match=r"did you mean 'cosine'\?"):
        specs.find("attention", "cosin")


def test_the_contract_holds_for_a_new_attention(cosine: str):
    """What the tests above ask of each name of the table, asked of a guest."""
    test_all_share_parameters_and_keys(cosine, True)
    test_tokens_are_a_set(cosine)
