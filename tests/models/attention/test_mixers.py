"""Every mixer of the table keeps one contract, and those with parameters of their own are naive loops."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sana_lab.config import registry
from sana_lab.config.specs import SpecError, build, find, options
from sana_lab.costs.flops import count_macs
from sana_lab.models.attention import Mixer, lacks_backward
from sana_lab.models.attention.gated_delta import gated_delta
from sana_lab.models.attention.gated_linear import MIN_LOG_DECAY, gated_linear
from sana_lab.models.attention.scan import chunked, joined, read, write

NAMES = sorted(registry.TABLE["attention"])
SCANS = ["gated_delta", "gated_linear"]
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def make(name: str, dim: int = 24, **changes: object) -> Any:
    """A mixer with heads of 8 and, away from their initial values, all its parameters."""
    torch.manual_seed(0)
    small = {"head_dim": 8, "blocks": 2, "rank": 4}
    small = {k: v for k, v in small.items() if k in options("attention", find("attention", name))}
    mixer = build("attention", {"name": name, **small, **changes}, dim=dim)
    with torch.no_grad():
        for p in mixer.parameters():
            p += 0.2 * torch.randn(p.shape) if p.device.type == "cpu" else 0
    return mixer


def tokens(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


# --- the contract, for every mixer


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("grid", [(1, 1), (4, 4), (3, 5), (1, 9)])
def test_any_grid_is_kept(name: str, grid: tuple[int, int]):
    x = tokens(2, *grid, 24, dtype=torch.float32)
    out = make(name)(x)
    assert out.shape == x.shape
    assert out.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_gradient_reaches_input_and_every_parameter(name: str):
    mixer, x = make(name), tokens(2, 3, 4, 24, dtype=torch.float32).requires_grad_()
    mixer(x).square().sum().backward()
    for gradient in [x.grad, *(p.grad for p in mixer.parameters())]:
        assert gradient is not None
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_the_derivative(name: str):
    mixer, x = make(name, dim=8).double(), tokens(1, 2, 3, 8).requires_grad_()
    assert torch.autograd.gradcheck(mixer, (x,), atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_images_of_a_batch_do_not_meet(name: str):
    mixer, x = make(name).double(), tokens(3, 4, 3, 24)
    assert torch.allclose(mixer(x)[1:2], mixer(x[1:2]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_output_keeps_the_dtype_and_agrees_with_float64(name: str, dtype: torch.dtype):
    """With the weights of that dtype, so that only the arithmetic differs."""
    mixer, x = make(name).to(dtype), tokens(2, 4, 4, 24).to(dtype)
    ours = mixer(x)
    exact = mixer.double()(x.double())
    assert ours.dtype == dtype
    assert (ours.double() - exact).norm() <= DTYPES[dtype] * exact.norm()


@pytest.mark.parametrize("name", NAMES)
def test_builds_on_the_meta_device(name: str):
    with torch.device("meta"):
        mixer = make(name)
        assert mixer(torch.empty(1, 2, 2, 24)).shape == (1, 2, 2, 24)
    assert not lacks_backward(mixer)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "conv"])
def test_widths_must_hold_whole_heads(name: str):
    with pytest.raises(SpecError, match="width 30 is not a multiple of the attention's head_dim 8"):
        make(name, dim=30)


# --- naive loops


def naive_gated_linear(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """Token by token: S = Diag(a) S + k^T v, o = q S."""
    out = torch.empty_like(v)
    for b in range(v.shape[0]):
        for h in range(v.shape[2]):
            state = v.new_zeros(k.shape[-1], v.shape[-1])
            for t in range(v.shape[1]):
                decay = log_decay[b, t, h].clamp(min=MIN_LOG_DECAY).exp()
                state = decay[:, None] * state + k[b, t, h][:, None] * v[b, t, h]
                out[b, t, h] = q[b, t, h] @ state
    return out


def naive_gated_delta(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    """Token by token: S = a (I - b k k^T) S + b k v^T, o = S^T q."""
    out = torch.empty_like(v)
    for b in range(v.shape[0]):
        for h in range(v.shape[2]):
            state = v.new_zeros(k.shape[-1], v.shape[-1])
            for t in range(v.shape[1]):
                key = k[b, t, h]
                kept = torch.eye(len(key), dtype=v.dtype) - beta[b, t, h] * torch.outer(key, key)
                state = log_decay[b, t, h].exp() * kept @ state + beta[b, t, h] * torch.outer(key, v[b, t, h])
                out[b, t, h] = state.T @ q[b, t, h]
    return out


def scan_inputs(name: str, length: int, dtype: torch.dtype, rate: float = 1.0) -> list[Tensor]:
    """Decays of all sizes about exp(-rate)."""
    q, k = tokens(2, 2, length, 2, 4, dtype=dtype)
    v, decay = tokens(2, length, 2, 6, dtype=dtype), -rate * tokens(2, length, 2, 4, dtype=dtype).exp()
    if name == "gated_linear":
        return [q, k, v, decay]
    return [F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, decay[..., 0], tokens(2, length, 2).sigmoid().to(dtype)]


LOOPS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "gated_linear": (gated_linear, naive_gated_linear),
    "gated_delta": (gated_delta, naive_gated_delta),
}


@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize("chunk", [1, 2, 8, 64])
@pytest.mark.parametrize("length", [1, 8, 21])
def test_a_recurrence_in_chunks_is_a_naive_loop(name: str, chunk: int, length: int):
    """Whatever the chunk, also where the last one is not full."""
    ours, naive = LOOPS[name]
    inputs = scan_inputs(name, length, torch.float64)
    assert torch.allclose(ours(*inputs, chunk=chunk), naive(*inputs), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SCANS)
def test_a_long_recurrence_in_float32_is_a_naive_loop(name: str):
    """Output and gradients within 1e-6 of the size of the values, over several chunks, at the decays of DiG's start."""
    ours, naive = LOOPS[name]
    inputs = [x.requires_grad_() for x in scan_inputs(name, 80, torch.float64, rate=0.043)]
    exact = naive(*inputs)
    gradients = torch.autograd.grad(exact.square().sum(), inputs)
    small = [x.detach().float().requires_grad_() for x in inputs]
    out = ours(*small)
    assert (out - exact).abs().max() <= 1e-6 * exact.abs().max()
    for a, b in zip(torch.autograd.grad(out.square().sum(), small), gradients, strict=True):
        assert (a - b).abs().max() <= 1e-6 * b.abs().max()


def test_the_fastest_decay_leaves_float32_finite():
    """Every decay at its end of e^-5, in values and gradients; without memory, out = q k^T v of the token alone."""
    q, k, v, _ = (x.requires_grad_() for x in scan_inputs("gated_linear", 70, torch.float32))
    out = gated_linear(q, k, v, torch.full_like(q, -100.0))
    gradients = torch.autograd.grad(out.square().sum(), [q, k, v])
    assert all(g.isfinite().all() for g in gradients)
    exact = naive_gated_linear(*(x.detach().double() for x in (q, k, v)), torch.full_like(q, -100.0).double())
    assert (out - exact).abs().max() <= 1e-6 * exact.abs().max()


@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize("order", range(5))
def test_a_scan_is_its_loop_over_the_tokens_in_its_direction(name: str, order: int):
    """The module from its weights, by the formulas of its page."""
    mixer, x = make(name).double(), tokens(1, 3, 2, 24)
    mixer.order = order
    y = F.conv2d(x.permute(0, 3, 1, 2), mixer.local.weight, padding=1, groups=24).permute(0, 2, 3, 1)
    places = [(i, j) for i in range(3) for j in range(2)]
    places = sorted(places, key=lambda at: (at[1], at[0])) if order // 2 % 2 else places
    places = places[::-1] if order % 2 else places
    seq = torch.stack([y[:, i, j] for i, j in places], 1)
    q, k, v, gate = (seq @ mixer.qkvg.weight.T).split([12, 12, 24, 24], -1)
    q, k, v = (t.unflatten(-1, (3, -1)) for t in (q, k, v))
    if name == "gated_linear":
        low, up = mixer.decay
        decay = torch.sigmoid(seq @ low.weight.T @ up.weight.T + up.bias).pow(1 / 16).log().unflatten(-1, (3, -1))
        mixed = naive_gated_linear(q, k, v, decay)
    else:
        forget, correct = (seq @ mixer.gates.weight.T).chunk(2, -1)
        decay = -mixer.rate.exp() * (1 + (forget + mixer.shift).exp()).log()
        q, k = (t / t.norm(dim=-1, keepdim=True) for t in (q, k))
        mixed = naive_gated_delta(q, k, v, decay, 1 / (1 + (-correct).exp()))
    normed = mixed / (mixed.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight
    out = mixer.proj(normed.flatten(2) * gate * gate.sigmoid())
    expected = torch.empty_like(x)
    for n, (i, j) in enumerate(places):
        expected[:, i, j] = out[:, n]
    assert torch.allclose(mixer(x), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 2)])
def test_mhla_is_a_naive_loop(grid: tuple[int, int], qk_norm: bool):
    """Token by token; a block has ceil(h / 2) rows and ceil(w / 2) columns, those at the edge what is left."""
    h, w = grid
    mixer, x = make("mhla", qk_norm=qk_norm).double(), tokens(1, h, w, 24)
    q, k, v = (x.flatten(1, 2) @ mixer.qkv.weight.T).chunk(3, -1)
    q, k, v = (t.unflatten(-1, (3, 8)) for t in (mixer.norm_q(q).relu(), mixer.norm_k(k).relu(), v))
    block = [i // math.ceil(h / 2) * 2 + j // math.ceil(w / 2) for i in range(h) for j in range(w)]
    mixed = torch.zeros_like(v)
    for head in range(3):
        for i in range(h * w):
            weights = [mixer.mixing[block[i], block[j]].exp() * (q[0, i, head] @ k[0, j, head]) for j in range(h * w)]
            weighted = sum(weight * v[0, j, head] for j, weight in enumerate(weights))
            mixed[0, i, head] = weighted / (sum(weights) + 1e-8)
    expected = mixer.proj(mixed.flatten(2)).view_as(x)
    assert torch.allclose(mixer(x), expected, rtol=1e-9, atol=1e-12)


def test_mhla_of_equal_weights_is_linear():
    mixer, linear = make("mhla").double(), make("linear").double()
    linear.load_state_dict({k: v for k, v in mixer.state_dict().items() if k != "mixing"})
    torch.nn.init.zeros_(mixer.mixing)
    x = tokens(2, 4, 6, 24)
    assert torch.allclose(mixer(x), linear(x))


def test_mhla_begins_with_the_distance_of_blocks():
    mixing = build("attention", {"name": "mhla", "blocks": 3}, dim=32).mixing
    assert mixing[0].tolist() == pytest.approx([0, -1, -2, -1, -(2**0.5), -(5**0.5), -2, -(5**0.5), -(8**0.5)])
    assert torch.equal(mixing, mixing.T)


def test_conv_is_a_naive_loop():
    """A pixel at a time: both convolutions, the norm over the grid, GELU by its tanh form."""
    mixer, x = make("conv", ratio=0.5, groups=3).double(), tokens(1, 3, 4, 24)

    def convolve(layer: torch.nn.Conv2d, x: Tensor) -> Tensor:
        out = torch.empty(3, 4, len(layer.weight), dtype=x.dtype)
        for i in range(3):
            for j in range(4):
                out[i, j] = layer.bias
                for a in range(max(0, i - 1), min(3, i + 2)):
                    for b in range(max(0, j - 1), min(4, j + 2)):
                        out[i, j] += layer.weight[:, :, a - i + 1, b - j + 1] @ x[a, b]
        return out

    hidden = convolve(mixer.expand, x[0]).unflatten(-1, (3, 4))
    mean, spread = hidden.mean((0, 1, 3), keepdim=True), hidden.var((0, 1, 3), keepdim=True, unbiased=False)
    normed = ((hidden - mean) / (spread + 1e-5).sqrt()).flatten(-2) * mixer.norm.weight + mixer.norm.bias
    active = normed * (1 + torch.tanh((2 / math.pi) ** 0.5 * (normed + 0.044715 * normed**3))) / 2
    assert torch.allclose(mixer(x), convolve(mixer.project, active)[None], rtol=1e-9, atol=1e-12)


# --- scans


@pytest.mark.parametrize("direction", range(5))
def test_a_scan_is_read_and_written_back(direction: int):
    grid = torch.arange(6).view(1, 2, 3, 1)
    orders = [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [0, 3, 1, 4, 2, 5], [5, 2, 4, 1, 3, 0], [0, 1, 2, 3, 4, 5]]
    assert read(grid, direction).flatten().tolist() == orders[direction]
    assert torch.equal(write(read(grid, direction), 2, 3, direction), grid)


def test_chunks_are_joined_again():
    x = tokens(2, 7, 3, 4)
    assert chunked(x, 4).shape == (2, 3, 2, 4, 4)
    assert torch.equal(joined(chunked(x, 4), 7), x)


@pytest.mark.parametrize("name", SCANS)
def test_one_scan_is_causal_and_the_next_the_other_way(name: str):
    mixer, x = make(name, kernel=1).double(), tokens(1, 3, 3, 24)
    other = x.clone()
    other[:, 1, 1] += 1
    for order, changed in enumerate((range(4, 9), range(5), (1, 4, 7, 2, 5, 8), (0, 3, 6, 1, 4))):
        mixer.order = order
        places = ((mixer(x) - mixer(other)).abs() > 1e-9).any(-1).flatten().nonzero().flatten().tolist()
        assert set(places) == set(changed) - ({1} if order == 2 else {7} if order == 3 else set())


@pytest.mark.parametrize("name", SCANS)
def test_the_convolution_begins_as_the_identity(name: str):
    torch.manual_seed(0)
    mixer, x = build("attention", name, dim=32), tokens(1, 3, 4, 32, dtype=torch.float32)
    assert torch.equal(mixer.local(x), x)


@pytest.mark.parametrize("name", SCANS)
def test_a_convolution_has_an_odd_side(name: str):
    with pytest.raises(SpecError, match="kernel is 4, expected an odd side, such as 5"):
        make(name, kernel=4)


def test_delta_begins_with_memories_of_10_to_1000_tokens():
    mixer = build("attention", "gated_delta", dim=96)
    assert F.softplus(mixer.shift).tolist() == pytest.approx([1e-3, 1e-2, 1e-1], rel=1e-4)


# --- costs


def formula(mixer: Mixer, name: str, n: int, c: int) -> int:
    """MACs of one image of n tokens of width c, heads of 8 and keys of 4, as docs/mixers.md has them."""
    h, d, k = c // 8, 8, 4
    projections = 4 * n * c * c
    if name in ("softmax", "linear", "mean"):
        core = {"softmax": 2 * n * n * c, "linear": h * n * (2 * d * d + d), "mean": 0}[name]
        return projections + core
    if name == "mhla":
        m = len(mixer.mixing)  # type: ignore[arg-type]
        return projections + h * (2 * n + m * m) * d * (d + 1)
    if name == "conv":
        hidden = int(c * 2 / 9)
        return 18 * n * c * hidden
    local = 9 * n * c
    if name == "gated_linear":
        s = 32
        n_full = -(-n // s) * s
        return projections + local + n * (c * 4 + 4 * h * k) + h * n_full * (s * (k + d) + 2 * k * d)
    s = 32
    n_full, chunks = -(-n // s) * s, -(-n // s)
    pairs = h * n_full * s * (2 * k + d) + h * n_full * (s - 1) * (k + d) // 2
    states = h * n_full * (3 * k * d + k * k) + h * (chunks - 1) * k * k * d
    return projections + local + 2 * n * c * h + pairs + states


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", [8, 16])
def test_macs_are_the_formula(name: str, side: int):
    """Forward by the formula, and a training step three times as much or near it."""
    with torch.device("meta"):
        mixer, x = make(name), torch.empty(1, side, side, 24, requires_grad=True)
        forward = count_macs(lambda: mixer(x))
        assert forward == formula(mixer, name, side * side, 24)
        both = count_macs(lambda: mixer(x).sum().backward())
    assert 2.8 * forward <= both <= 3.6 * forward
