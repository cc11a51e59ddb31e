"""Interfaces of what mixes the tokens of a DiT's block, and the stack of one mixer per block.

A `Mixer` maps tokens to tokens, sees their grid and may own any parameters. `Attention` is the pure case: shared
projections, and subclasses that differ only in how they mix q, k and v. Softmax and linear attention so have the same
parameters, state-dict keys, heads, biases and norms (in the released code the option also changes head width, bias and
norm).
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sana_lab.config.specs import Spec, SpecError
from sana_lab.models.layers import RmsNorm, saturated
from sana_lab.ops.cpu_linear import product


class Mixer(nn.Module, ABC):
    """Exchange of information between the tokens of each image, at any grid; projections included."""

    order: int = 0  # blocks below with a mixer of the same class; scans choose their direction by it

    has_identity: bool = False
    """Whether it has `unmixed`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C)."""

    def unmixed(self, x: Tensor) -> Tensor:
        """The same with the identity in place of the mixing, for perturbed-attention guidance (`sampling.pag`), of a
        mixer with `has_identity`."""
        raise NotImplementedError(f"{type(self).__name__} has no identity in place of its mixing")


class Attention(Mixer):
    """Self-attention over a grid of tokens; a subclass implements `mix`.

    As in SANA: qkv without bias, optional RMSNorm of q and k over the full width, output projection with bias.
    """

    has_identity = True

    def __init__(self, dim: int, head_dim: int, qk_norm: bool) -> None:
        super().__init__(dim)
        self.heads = whole_heads(dim, head_dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.norm_q = RmsNorm(dim) if qk_norm else nn.Identity()
        self.norm_k = RmsNorm(dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    @abstractmethod
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (B, N, H, D), views of the fused projection -> (B, N, H, D)."""

    def forward(self, x: Tensor, values: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C); `values` maps the values (B, N, H, D) to those that are mixed.

        A subclass that overrides it without `values` offers none to an edit (`diffusion.inversion`).
        """
        qkv = self.projected(x)
        if values is not None:
            q, k, v = qkv.unbind(2)
            qkv = torch.stack([q, k, values(v)], 2)
        return self.output(self.mix_fused(qkv), x)

    def projected(self, x: Tensor) -> Tensor:
        """Fused projection (B, N, 3, H, D) of tokens (B, h, w, C): q, k and v."""
        return product(self.qkv, x).flatten(1, 2).unflatten(-1, (3, self.heads, -1))

    def output(self, mixed: Tensor, x: Tensor) -> Tensor:
        """Output projection of mixed values (B, N, H, D), in the shape of tokens x (B, h, w, C)."""
        return saturated(self.proj(mixed.flatten(2))).view_as(x)

    def unmixed(self, x: Tensor) -> Tensor:
        """Each token attends to itself alone: its value, projected (PAG, arXiv 2403.17377)."""
        return self.output(self.projected(x)[:, :, 2], x)

    def mix_fused(self, qkv: Tensor) -> Tensor:
        """Norms and `mix` of the projection (B, N, 3, H, D) -> (B, N, H, D); to override where a kernel fuses them."""
        q, k, v = qkv.unbind(2)
        q, k = self.norm_q(q.flatten(2)).view_as(q), self.norm_k(k.flatten(2)).view_as(k)
        return self.mix(q, k, v)


def whole_heads(dim: int, head_dim: int) -> int:
    """The number of heads. SpecError unless they fill the width."""
    if dim % head_dim:
        raise SpecError(f"width {dim} is not a multiple of the attention's head_dim {head_dim}")
    return dim // head_dim


def layers(attention: Spec | list[Spec], depth: int) -> list[Spec]:
    """One spec for each of `depth` blocks: a spec for all, or a pattern that repeats. SpecError if it does not fit."""
    pattern = attention if isinstance(attention, list) else [attention]
    if depth % len(pattern):
        below = depth - depth % len(pattern)
        depths = " or ".join(str(d) for d in (below, below + len(pattern)) if d)
        lengths = ", ".join(str(n) for n in range(1, depth + 1) if depth % n == 0)
        raise SpecError(
            f"attention is a pattern of {len(pattern)} layers, of which depth {depth} is no multiple; expected a "
            f"pattern of {lengths} layers, or depth {depths}"
        )
    return pattern * (depth // len(pattern))


def number(mixers: Sequence[Mixer]) -> None:
    """Set `order`: how many mixers of the same class come before each."""
    counts: Counter[type[Mixer]] = Counter()
    for mixer in mixers:
        mixer.order = counts[type(mixer)]
        counts[type(mixer)] += 1


def lacks_backward(mixer: Mixer) -> bool:
    """Whether no gradient reaches the input, by a run on the meta device; False if the mixer does not run there."""
    dtype = next((p.dtype for p in mixer.parameters()), torch.float32)
    x = torch.empty(1, 2, 2, mixer.dim, device="meta", dtype=dtype, requires_grad=True)
    try:
        with torch.enable_grad():
            out = mixer(x)
    except (NotImplementedError, RuntimeError):
        return False
    try:
        return torch.autograd.grad(out.sum(), x, allow_unused=True)[0] is None
    except (NotImplementedError, RuntimeError):
        return True
