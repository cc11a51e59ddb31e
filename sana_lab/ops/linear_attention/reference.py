"""ReLU linear attention (Katharopoulos et al. 2020; SANA, section 2.2): reference and public functions.

B batch, N tokens, H heads, D head width:
    S = relu(k)^T v  (D, D)      z = sum over tokens of relu(k)  (D)      out = relu(q) S / (relu(q) z + eps)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sana_lab.ops.backend import Backend, check_launchable, choose, is_direct, no_autocast
from sana_lab.ops.linear_attention.few_passes import applies, few_passes

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KERNEL_WIDTH = 128


class Norms(NamedTuple):
    """RMSNorm of q and k over all heads together (SANA-1.5): weights (H D,) and eps, added to the mean square."""

    q: Tensor
    k: Tensor
    eps: float = 1e-5


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, eps: float = 1e-8, backend: Backend = "auto", mask: Tensor | None = None
) -> Tensor:
    """Attention between all tokens at a cost linear in N: (B, N, H, D) each -> (B, N, H, D), in v's dtype.

    q, k, v may have any strides (views of a fused projection (B, N, 3, H, D) are read in place); `mask` (B, N) bool is
    True at valid keys. Each output is a weighted mean of v's rows with weights relu(q) relu(k) >= 0, so
    |out| <= max |v|; a token whose relu(q) is all zero gives 0.

    Precision: S, z, the normaliser and the division are float32 (float64 for float64 inputs); k^T v multiplies in the
    input dtype, and float32 holds products of half-precision values exactly; the result is rounded once. For bfloat16
    the kernel may also round S to TF32. ValueError for invalid shapes or dtypes, or an unsupported backend.
    """
    check(q, k, v, mask, eps)
    if not uses_kernel(q, backend):
        return few_passes(q, k, v, mask, eps) if applies(q) else definition(q, k, v, mask, eps)
    from sana_lab.ops.linear_attention import autograd as op

    apply = op.formulas(q).forward if is_direct(q) else op.linear_attention
    return apply(q, k, v, mask, eps)[0]


def qkv_linear_attention(
    qkv: Tensor,
    norms: Norms | None = None,
    *,
    eps: float = 1e-8,
    backend: Backend = "auto",
    mask: Tensor | None = None,
) -> Tensor:
    """`linear_attention` of a fused projection (B, N, 3, H, D) of any strides, with normalised q and k: (B, N, H, D).

    The kernel returns the gradient as one tensor shaped like `qkv`, without copies. It does not round the normalised q
    and k, and omits division by q's root mean square, which cancels except in eps: it adds eps where the reference adds
    eps * sqrt(mean square of q + norms.eps), so for q near zero its eps of 1e-8 is equivalent to 3e-6 in the reference.
    """
    check_fused(qkv, norms)
    q, k, v = qkv.unbind(2)
    check(q, k, v, mask, eps)
    if not uses_kernel(q, backend):
        return (few_passes if applies(q) else definition)(*normed(q, k, v, norms), mask, eps)
    from sana_lab.ops.linear_attention import autograd as op

    apply = op.formulas(qkv).qkv_forward if is_direct(qkv) else op.qkv_linear_attention
    return apply(qkv, *(norms or (None, None, 1.0)), mask, eps)[0]


def uses_kernel(q: Tensor, backend: Backend) -> bool:
    """Whether to use the kernel; ValueError for an explicit `triton` that cannot run."""
    if choose(backend, q.device, unsupported(q)) == "torch":
        return False
    from sana_lab.ops.linear_attention import launch as kernel

    check_launchable(q.device, kernel.INTERPRETED)
    return True


def definition(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, eps: float) -> Tensor:
    """Linear attention in plain torch, without autocast; arguments as in `linear_attention`, not checked."""
    dtype = v.dtype
    with no_autocast(v.device):
        q, k, v = (x.transpose(1, 2).to(torch.promote_types(dtype, torch.float32)) for x in (q, k, v))  # (B, H, N, D)
        q, k = q.relu(), k.relu()
        if mask is not None:
            k = k.masked_fill(~mask[:, None, :, None], 0)
        state = k.mT @ v  # (B, H, D, D)
        total = k.sum(2, keepdim=True)  # (B, H, 1, D)
        return (q @ state / (q @ total.mT + eps)).transpose(1, 2).to(dtype)


def normed_definition(qkv: Tensor, norms: Norms | None, mask: Tensor | None, eps: float) -> Tensor:
    """RMSNorm of q and k, rounded to their dtype, then `definition`."""
    q, k, v = qkv.unbind(2)
    return definition(*normed(q, k, v, norms), mask, eps)


def normed(q: Tensor, k: Tensor, v: Tensor, norms: Norms | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (B, N, H, D), with RMSNorm of q and k, rounded to their dtype."""
    if norms is not None:
        q, k = normalise(q, norms.q, norms.eps), normalise(k, norms.k, norms.eps)
    return q, k, v


def normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of (B, N, H, D) over the last two axes together, statistics in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(2)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.to(wide.dtype)).to(x.dtype).view(x.shape)


def unsupported(q: Tensor) -> str | None:
    """Requirement of the kernel that `q` does not meet, for an error message; None if supported."""
    if q.dtype not in KERNEL_DTYPES:
        return f"float16, bfloat16 or float32 tensors, not {q.dtype}"
    return unsupported_width(q.shape[-1])


def unsupported_width(d: int) -> str | None:
    """Requirement of the kernel that a head width does not meet, for an error message; None if supported."""
    return None if d <= KERNEL_WIDTH else f"a head width of at most {KERNEL_WIDTH}, not {d}"


def check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, eps: float) -> None:
    """ValueError unless q, k, v are (B, N, H, D) of one float dtype and device, mask (B, N) bool, and eps > 0."""
    if q.ndim != 4 or not q.shape == k.shape == v.shape:
        raise ValueError(f"q, k, v must be (B, N, H, D) of one shape; got {[tuple(x.shape) for x in (q, k, v)]}")
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise ValueError(f"q, k, v must have one floating dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k, v must be on one device; got {q.device}, {k.device}, {v.device}")
    if mask is not None and (mask.shape != q.shape[:2] or mask.dtype != torch.bool or mask.device != q.device):
        expected = f"bool of shape {tuple(q.shape[:2])} on {q.device}"
        raise ValueError(f"mask must be {expected}; got {mask.dtype} of shape {tuple(mask.shape)} on {mask.device}")
    if not eps >= torch.finfo(torch.float32).tiny:
        raise ValueError(f"eps must be a float32 above zero (1.2e-38 or more), or an empty row gives NaN; got {eps}")


def check_fused(qkv: Tensor, norms: Norms | None) -> None:
    """ValueError unless qkv is (B, N, 3, H, D) and the norms fit it."""
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"a fused projection must be (B, N, 3, H, D); got {tuple(qkv.shape)}")
    if norms is None:
        return
    width = qkv.shape[3] * qkv.shape[4]
    for name, weight in (("q", norms.q), ("k", norms.k)):
        if weight.shape != (width,) or weight.device != qkv.device or not weight.is_floating_point():
            expected = f"floating, of shape ({width},), on {qkv.device}"
            got = f"{weight.dtype} of shape {tuple(weight.shape)} on {weight.device}"
            raise ValueError(f"the norm's weight for {name} must be {expected}; got {got}")
    if not norms.eps > 0:
        raise ValueError(f"the norm's eps must be above zero, or a row of zeros gives NaN; got {norms.eps}")
