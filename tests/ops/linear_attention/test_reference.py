"""The definition of linear attention against a loop over pairs of tokens, and the choice of a backend."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sana_lab.ops.linear_attention import Norms, linear_attention, qkv_linear_attention
from sana_lab.ops.linear_attention.reference import normed_definition

EPS = 1e-8
BOUNDS = {torch.float16: 2**-12, torch.bfloat16: 2**-9, torch.float32: 2**-22, torch.float64: 1e-15}  # relative L2


def qkv(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """A fused projection (B, N, 3, H, D)."""
    b, n, h, d = shape
    return torch.randn(b, n, 3, h, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def naive(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Token by token, a mean of the values weighted by relu(q_i) . relu(k_j); O(N^2)."""
    out = torch.zeros_like(v)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            keys = [j for j in range(q.shape[1]) if mask is None or mask[b, j]]
            for i in range(q.shape[1]):
                weights = [float(q[b, i, h].clamp(min=0) @ k[b, j, h].clamp(min=0)) for j in keys]
                rows = [w * v[b, j, h] for w, j in zip(weights, keys, strict=True)]
                out[b, i, h] = sum(rows, torch.zeros_like(v[0, 0, 0])) / (sum(weights) + EPS)
    return out


@pytest.mark.parametrize("grad", [False, True])  # without: in few passes
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(2, 7, 3, 4), (1, 1, 1, 8), (1, 13, 2, 5)])
def test_definition_is_the_weighted_mean(shape: tuple[int, ...], masked: bool, grad: bool) -> None:
    q, k, v = qkv(*shape).unbind(2)
    mask = torch.arange(shape[0] * shape[1]).reshape(shape[:2]) % 3 != 1 if masked else None
    with torch.set_grad_enabled(grad):
        out = linear_attention(q, k, v, mask=mask)
    torch.testing.assert_close(out, naive(q, k, v, mask), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("norms", [False, True])
def test_few_passes_leave_their_input_and_are_contiguous(norms: bool) -> None:
    x = qkv(2, 70, 3, 8, dtype=torch.float32)
    weights = Norms(torch.linspace(0.5, 2, 24), torch.linspace(2, 0.5, 24)) if norms else None
    before = x.clone()
    with torch.inference_mode():
        out = qkv_linear_attention(x, weights)
    torch.testing.assert_close(out, normed_definition(x, weights, None, EPS))
    assert out.is_contiguous()
    assert torch.equal(x, before)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_result_is_rounded_once(dtype: torch.dtype, grad: bool) -> None:
    """Half of the last place at most in half precision, as if all between were exact."""
    projected = qkv(2, 333, 2, 16, dtype=dtype)
    with torch.set_grad_enabled(grad):
        out = linear_attention(*projected.unbind(2))
    q, k, v = (x.double() for x in projected.unbind(2))
    weights = torch.einsum("bihd,bjhd->bhij", q.relu(), k.relu())
    exact = torch.einsum("bhij,bjhd->bihd", weights / (weights.sum(-1, keepdim=True) + EPS), v)
    assert out.dtype == dtype
    assert float((out.double() - exact).norm() / exact.norm()) < BOUNDS[dtype]


@pytest.mark.parametrize("masked", [False, True])
def test_gradients(masked: bool) -> None:
    projected = qkv(2, 5, 2, 3).requires_grad_()
    mask = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 0]]).bool() if masked else None
    assert torch.autograd.gradcheck(lambda x: linear_attention(*x.unbind(2), mask=mask), projected)


def test_float16_sums_do_not_overflow() -> None:
    x = torch.full((1, 4096, 1, 4), 200.0, dtype=torch.float16)  # S and z are 1.6e8 and 8.2e5, float16 ends at 65504
    torch.testing.assert_close(linear_attention(x, x, x), x)


def test_output_stays_among_the_values() -> None:
    q, k, v = qkv(1, 50, 2, 8).unbind(2)
    out = linear_attention(q, k, v)
    assert (out <= v.amax(1, keepdim=True)).all()
    assert (out >= v.amin(1, keepdim=True)).all()


def test_nothing_to_attend_gives_zero() -> None:
    q, k, v = qkv(1, 6, 1, 4).unbind(2)
    q = torch.where(torch.arange(6)[None, :, None, None] == 2, -q.abs(), q.abs()).requires_grad_()
    out = linear_attention(q, k, v)
    assert (out[:, 2] == 0).all()
    assert (out[:, :2] != 0).any()
    assert torch.autograd.grad(out.sum(), q)[0].isfinite().all()
    assert (linear_attention(q, k, v, mask=torch.zeros(1, 6, dtype=torch.bool)) == 0).all()


def test_autocast_does_not_lower_the_sums() -> None:
    q, k, v = qkv(1, 65, 2, 16, dtype=torch.float32).unbind(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = linear_attention(q, k, v)
    assert torch.equal(inside, linear_attention(q, k, v))


def test_shape_and_flops_on_meta() -> None:
    projected = torch.empty(2, 9, 3, 4, 8, device="meta")
    with FlopCounterMode(display=False) as counter:
        out = linear_attention(*projected.unbind(2))
    assert out.shape == (2, 9, 4, 8)
    assert counter.get_total_flops() == 2 * (2 * 9 * 4) * (8 * 8 + 8 * 8 + 8)  # k^T v, q S, q z


def test_compiles_in_one_graph() -> None:
    projected, mask = qkv(1, 9, 2, 4), torch.arange(9)[None] < 7
    compiled = torch.compile(linear_attention, fullgraph=True, backend="aot_eager")
    q, k, v = projected.unbind(2)
    torch.testing.assert_close(compiled(q, k, v, mask=mask), linear_attention(q, k, v, mask=mask))


@pytest.mark.parametrize(
    ("dtype", "width", "needs"),
    [
        (torch.float64, 8, "bfloat16 or float32 tensors, not torch.float64"),
        (torch.float32, 256, "at most 128, not 256"),
    ],
)
def test_explicit_triton_never_falls_back(dtype: torch.dtype, width: int, needs: str) -> None:
    with pytest.raises(ValueError, match=needs):
        linear_attention(*qkv(1, 2, 1, width, dtype=dtype).unbind(2), backend="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 4)}, r"must be \(B, N, H, D\) of one shape; got \[\(2, 3, 4\)"),
        ({"v": torch.zeros(2, 3, 4, 6)}, "of one shape"),
        ({"k": torch.zeros(2, 3, 4, 5, dtype=torch.float16)}, "one floating dtype; got torch.float32, torch.float16"),
        ({"k": torch.zeros(2, 3, 4, 5, device="meta")}, "one device; got cpu, meta, cpu"),
        (
            {"mask": torch.ones(3, 2).bool()},
            r"mask must be bool of shape \(2, 3\) on cpu; got torch.bool",
        ),
        ({"mask": torch.ones(2, 3)}, "got torch.float32"),
        ({"eps": 0.0}, "eps must be"),
        ({"eps": float("nan")}, "eps must be"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, object], message: str) -> None:
    good = {name: torch.zeros(2, 3, 4, 5) for name in "qkv"}
    with pytest.raises(ValueError, match=message):
        linear_attention(**(good | change))  # type: ignore[arg-type]


def naive_norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm over all heads of each token, one token at a time."""
    tokens = [row / (row.square().mean() + 1e-5).sqrt() * weight for row in x.flatten(0, 1).flatten(1)]
    return torch.stack(tokens).view(x.shape)


def test_a_fused_projection_with_norms_is_norms_then_attention() -> None:
    projected, weights = qkv(2, 7, 3, 4), qkv(1, 4, 1, 1).flatten()
    norms = Norms(weights, weights.flip(0))
    q, k, v = projected.unbind(2)
    want = naive(naive_norm(q, norms.q), naive_norm(k, norms.k), v)
    torch.testing.assert_close(qkv_linear_attention(projected, norms), want, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(qkv_linear_attention(projected), naive(q, k, v), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("shape", "norms", "message"),
    [
        ((2, 5, 4, 3, 8), None, r"fused projection must be \(B, N, 3, H, D\); got \(2, 5, 4, 3, 8\)"),
        ((2, 5, 72), None, r"must be \(B, N, 3, H, D\); got \(2, 5, 72\)"),
        ((2, 5, 3, 3, 8), Norms(torch.ones(8), torch.ones(24)), r"weight for q must be .* \(24,\).*; got .* \(8,\)"),
        ((2, 5, 3, 3, 8), Norms(torch.ones(24), torch.ones(24).long()), "weight for k must be floating.*int64"),
        ((2, 5, 3, 3, 8), Norms(torch.ones(24), torch.ones(24), 0.0), "norm's eps must be above zero"),
    ],
)
def test_a_projection_that_cannot_be_is_refused(shape: tuple[int, ...], norms: Norms | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qkv_linear_attention(torch.zeros(shape), norms)
