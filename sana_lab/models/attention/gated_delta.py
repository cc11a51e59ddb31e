"""Gated delta rule (Gated DeltaNet, arXiv 2412.06464), the linear mixer of SANA-WM, along a scan of the grid.

Per head:  S_t = a_t (I - b_t k_t k_t^T) S_(t-1) + b_t k_t v_t^T,  o_t = S_t^T q_t,  q and k of length 1. Legend: B
batch, N tokens, H heads, K width of a key, D width of a value, M chunks of C tokens.
"""

import math
from typing import Annotated, Literal, final

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn
from torch.nn import functional as F

from sana_lab.config.ranges import PositiveShare, Width
from sana_lab.models.attention import Mixer, whole_heads
from sana_lab.models.attention.scan import Depthwise, chunked, joined, read, widened, write
from sana_lab.models.layers import RmsNorm, hidden_width, saturated
from sana_lab.ops.backend import no_autocast

CHUNK = 32
"""Tokens of a chunk; within one, all pairs are computed."""

SLOWEST, FASTEST = 1e-3, 1e-1
"""Range of minus the log of a decay at initialisation: the heads begin with a memory of 1000 to 10 tokens."""


@final
class GatedDelta(Mixer):
    """A state that forgets by a = exp(-exp(r) softplus(x A + s)) and is corrected by b = sigmoid(x B) at each key.

    The output is normed per head and gated by SiLU. A 3 x 3 depthwise convolution, at first the identity, precedes the
    projections. Plain torch on every device.
    """

    def __init__(
        self,
        head_dim: Width = 32,  # width of a head's values; divides the model's width
        key_ratio: PositiveShare = 0.5,  # width of a head's keys as a share of its values'
        scan: Literal["alternate", "rows"] = "alternate",  # direction: another one in each layer of four, or rows
        kernel: Annotated[int, Ge(1), Le(15)] = 3,  # side of the depthwise convolution; odd, 1 is none
        *,
        dim: int,
    ) -> None:
        super().__init__(dim)
        self.heads, keys = whole_heads(dim, head_dim), whole_heads(dim, head_dim) * hidden_width(key_ratio, head_dim)
        self.scan, self.widths = scan, [keys, keys, dim, dim]
        self.local = Depthwise(dim, kernel) if kernel > 1 else nn.Identity()
        self.qkvg = nn.Linear(dim, sum(self.widths), bias=False)
        self.gates = nn.Linear(dim, 2 * self.heads, bias=False)
        rates = torch.logspace(math.log10(SLOWEST), math.log10(FASTEST), self.heads)
        self.rate = nn.Parameter(torch.zeros(self.heads))
        self.shift = nn.Parameter(rates.expm1().log())  # the inverse of softplus
        self.norm = RmsNorm(head_dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        direction = self.order if self.scan == "alternate" else 0
        tokens = read(self.local(x), direction)  # (B, N, C)
        q, k, v, gate = self.qkvg(tokens).split(self.widths, -1)
        forget, correct = widened(self.gates(tokens)).chunk(2, -1)  # (B, N, H)
        decay = -widened(self.rate).exp() * F.softplus(forget + widened(self.shift))
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (q, k, v))
        mixed = gated_delta(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, decay, correct.sigmoid())
        out = self.proj(self.norm(mixed).flatten(2) * F.silu(gate))
        return saturated(write(out, x.shape[1], x.shape[2], direction))


def gated_delta(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, chunk: int = CHUNK) -> Tensor:
    """The recurrence in chunks: q, k (B, N, H, K), v (B, N, H, D), log decays and beta (B, N, H) -> (B, N, H, D).

    Within a chunk S_t = a_1..a_t S_0 + sum_(j <= t) a_(j+1)..a_t k_j u_j^T, where the corrections u solve a unit lower
    triangular system (the WY form of arXiv 2406.06484). Everything is float32, or float64 where v is.
    """
    dtype, tokens = v.dtype, v.shape[1]
    with no_autocast(v.device):
        parts = (q, k, v, log_decay[..., None], beta[..., None])
        q, k, v, decay, beta = (chunked(widened(t), chunk) for t in parts)
        total = decay.cumsum(-2)  # (B, H, M, C, 1): log of the decay since the chunk began
        upper = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
        between = (total - total.mT).masked_fill(upper, -torch.inf).exp()  # a_(j+1) ... a_i, 0 above the diagonal
        system = beta * between * (k @ k.mT)  # (B, H, M, C, C), of which the part below the diagonal is read
        right = torch.cat([beta * v, beta * total.exp() * k], -1)
        solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
        own, of_state = solved.split([v.shape[-1], k.shape[-1]], -1)  # u = own - of_state S_0
        last = total[..., -1:, :]
        kept = (k * (last - total).exp()).mT  # (B, H, M, K, C)
        eye = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
        before = _carry(last.exp() * eye - kept @ of_state, kept @ own)
        out = (total.exp() * q) @ before + (between * (q @ k.mT)) @ (own - of_state @ before)
        return joined(out, tokens).to(dtype)


def _carry(transitions: Tensor, additions: Tensor) -> Tensor:
    """States at the beginning of M chunks: S_(m+1) = transitions_m S_m + additions_m, S_0 = 0; (B, H, M, K, D)."""
    states = [torch.zeros_like(additions[:, :, 0])]
    for m in range(additions.shape[2] - 1):
        states.append(additions[:, :, m] + transitions[:, :, m] @ states[-1])
    return torch.stack(states, 2)
