"""The operators where no kernel can run, by their closed form on the CPU; and how tokens and heads are cut."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from sana_lab.ops.linear_attention import Norms
from sana_lab.ops.linear_attention import autograd as op
from sana_lab.ops.linear_attention import closed_form as closed
from sana_lab.ops.linear_attention.reference import definition, normed_definition
from sana_lab.ops.linear_attention.tiling import Tiling, group, plan, single, split

EPS = 1e-8
SHAPE = (2, 7, 3, 4)
Norm = tuple[Tensor, Tensor, float]


@pytest.fixture(autouse=True)
def _not_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process without TRITON_INTERPRET."""
    kernels = pytest.importorskip("sana_lab.ops.linear_attention.launch")
    monkeypatch.setattr(kernels, "INTERPRETED", False)


def qkv(dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    b, n, h, d = SHAPE
    return torch.randn(b, n, 3, h, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def mask() -> Tensor:
    return torch.arange(14).reshape(2, 7) % 4 != 1


def weights(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(12, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return q, k


def test_closed_form_is_the_definition() -> None:
    q, k, v = qkv().unbind(2)
    out, state = closed.forward(q, k, v, mask(), EPS)
    torch.testing.assert_close(out, definition(q, k, v, mask(), EPS), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(state[:, :, -1], (k.relu() * mask()[..., None, None]).sum(1))


def test_closed_form_with_norms_is_the_definition_up_to_eps() -> None:
    x, (norm_q, norm_k) = qkv(), weights()
    out = closed.qkv_forward(x, norm_q, norm_k, 1e-5, mask(), 1e-30)[0]
    want = normed_definition(x, Norms(norm_q, norm_k), mask(), 1e-30)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_derivatives(masked: bool) -> None:
    keep, x = mask() if masked else None, qkv()
    q, k, v = (y.detach().requires_grad_() for y in x.unbind(2))
    assert torch.autograd.gradcheck(lambda *qkv: op.linear_attention(*qkv, keep, EPS)[0], (q, k, v))
    norms = [w.requires_grad_() for w in weights()]
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda *xw: op.qkv_linear_attention(*xw, 1e-5, keep, EPS)[0], (x, *norms))
    assert torch.autograd.gradcheck(lambda x: op.qkv_linear_attention(x, None, None, 1.0, keep, EPS)[0], x)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # read by opcheck itself
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_operator_contract(dtype: torch.dtype, masked: bool) -> None:
    """Schema, fake tensors, autograd registration, tracing, and dynamic shapes, as torch itself checks them."""
    x, keep = qkv(dtype), mask() if masked else None
    q, k, v = (y.detach().requires_grad_() for y in x.unbind(2))
    torch.library.opcheck(op.linear_attention, (q, k, v, keep, EPS))
    norms = [w.requires_grad_() for w in weights(torch.float32)] if masked else [None, None]
    fused = (x.requires_grad_(), *norms, 1e-5, keep, EPS)
    torch.library.opcheck(op.qkv_linear_attention, fused)
    out, state, rstd = (y.detach() for y in op.qkv_linear_attention(*fused))
    x, *norms = (None if y is None else y.detach() for y in (x, *norms))
    torch.library.opcheck(op.qkv_linear_attention_backward, (out, x, *norms, keep, state, rstd, EPS))
    torch.library.opcheck(op.linear_attention_backward, (out, *x.unbind(2), keep, state, EPS))


def loss(x: Tensor, norms: tuple[Tensor, Tensor], keep: Tensor) -> Tensor:
    """Both operators in a row."""
    y = op.qkv_linear_attention(x, *norms, 1e-5, keep, EPS)[0]
    return op.linear_attention(y, y.square(), y, None, EPS)[0].float().square().sum()


def test_compiles_in_one_graph() -> None:
    x, rest = qkv(torch.float32).requires_grad_(), (weights(torch.float32), mask())
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, *rest), loss(x, *rest))
    got, want = (torch.autograd.grad(run(x, *rest), x)[0] for run in (compiled, loss))
    torch.testing.assert_close(got, want)


def test_autocast_and_a_checkpoint_change_no_bit() -> None:
    x, rest = qkv(torch.float32).requires_grad_(), (weights(torch.float32), mask())
    (want,) = torch.autograd.grad(loss(x, *rest), x)
    assert torch.equal(torch.autograd.grad(checkpoint(loss, x, *rest, use_reentrant=False), x)[0], want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(x, *rest)
    assert torch.equal(torch.autograd.grad(inside, x)[0], want)


def test_exports_for_any_number_of_tokens() -> None:
    norms = weights(torch.float32)

    class Core(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return op.qkv_linear_attention(x, *norms, 1e-5, None, EPS)[0]

    shapes = {"x": {1: torch.export.Dim("tokens", min=2, max=65536)}}
    program = torch.export.export(Core(), (qkv(torch.float32),), dynamic_shapes=shapes)
    longer = torch.randn(2, 33, 3, 3, 4)
    assert torch.equal(program.module()(longer), Core()(longer))


def test_flops_by_formula() -> None:
    """Forward 2 B N H D (2 D + 1), as the definition's products; backward twice that."""
    once = 2 * 2 * 7 * 3 * 4 * 9
    counts = []
    for run in (
        lambda x: definition(*x.unbind(2), None, EPS),
        lambda x: op.linear_attention(*x.unbind(2), None, EPS)[0],
        lambda x: op.qkv_linear_attention(x, None, None, 1.0, None, EPS)[0],
        lambda x: op.qkv_linear_attention(x, *weights(torch.float32), 1e-5, None, EPS)[0],
    ):
        with FlopCounterMode(display=False) as counter:
            out = run(qkv(torch.float32).requires_grad_())
            forward = counter.get_total_flops()
            out.sum().backward()
        counts.append((forward, counter.get_total_flops()))
    assert counts == [(once, 3 * once)] * 4


# --- plans


def shaped(batch: int, n: int, heads: int, d: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(batch, n, heads, d, dtype=dtype, device="meta")


def cover(cut: Tiling, x: Tensor) -> bool:
    """Every token and every head belongs to a program, and a program's columns hold its heads."""
    batch, n, heads, d = x.shape
    groups, runs = cut.grid(x)
    holds = runs * cut.loops * cut.tile >= n and groups * cut.group >= batch * heads and cut.width >= cut.group * d
    powers = all(p & (p - 1) == 0 for p in (cut.width, cut.group, cut.tile, cut.loops, cut.warps))
    return holds and powers and cut.width >= 16 and (runs == 1 or not cut.single) and (cut.group == 1 or d >= 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("d", [16, 20, 24, 32, 48, 64, 72, 96, 112, 128])
def test_plans_cover_the_tokens(dtype: torch.dtype, d: int) -> None:
    for batch, n, heads in [(1, 1, 1), (2, 255, 36), (2, 1024, 36), (2, 4096, 36), (1, 65536, 70), (64, 1024, 36)]:
        x = shaped(batch, n, heads, d, dtype)
        groups = [split(x, group(x, row), programs) for row in (64, 128, 256) for programs in (264, 528)]
        plans = [plan(x), *groups, *([single(x)] if n <= 4096 else [])]
        assert all(cover(cut, x) for cut in plans), (x.shape, plans)


def test_plans_fill_the_card_or_launch_once() -> None:
    """SANA-0.6B under guidance: one launch to 1,024 tokens, then about four programs for each of 132 processors."""
    assert plan(shaped(2, 1024, 36, 32)).single
    assert not plan(shaped(1, 1024, 36, 32)).single  # 36 programs would leave most of a card idle
    for n in (4096, 16384):
        x = shaped(2, n, 36, 32)
        groups, runs = plan(x).grid(x)
        assert 4 * 132 <= groups * runs <= 8 * 132
        assert runs <= 16


def test_plans_are_few() -> None:
    """What is compiled does not follow the number of tokens."""
    assert len({plan(shaped(2, n, 36, 32)) for n in range(64, 16385, 64)}) <= 12
