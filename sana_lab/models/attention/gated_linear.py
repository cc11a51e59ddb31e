"""Gated linear attention (GLA, arXiv 2312.06635) as diffusion uses it (DiG, arXiv 2405.18428), linear in the tokens.

Per head, along a scan of the grid:  S_t = Diag(a_t) S_(t-1) + k_t^T v_t,  o_t = q_t S_t. Legend: B batch, N tokens,
H heads, K width of a key, D width of a value, M chunks of C tokens.
"""

from typing import Annotated, Literal, final

from annotated_types import Ge, Le
from torch import Tensor, nn
from torch.nn import functional as F

from sana_lab.config.ranges import Positive, PositiveShare, Width
from sana_lab.models.attention import Mixer, whole_heads
from sana_lab.models.attention.scan import Depthwise, chunked, joined, read, widened, write
from sana_lab.models.layers import RmsNorm, hidden_width, saturated
from sana_lab.ops.backend import no_autocast

CHUNK = 32
"""Tokens of a chunk; within one, all pairs are computed."""

MIN_LOG_DECAY = -5.0
"""Smallest log of a decay. With it, exponents within half a chunk stay within float32's range."""


@final
class GatedLinear(Mixer):
    """Linear attention along a scan whose state decays by data-dependent gates; output normed and gated.

    o_t = q_t S_t, S_t = sum_(j <= t) (a_(j+1) ... a_t k_j)^T v_j with a = sigmoid(x W1 W2 + b)^(1/temperature).
    A 3 x 3 depthwise convolution, at first the identity, precedes the projections, since one scan sees one side only.
    Plain torch on every device.
    """

    def __init__(
        self,
        head_dim: Width = 32,  # width of a head's values; divides the model's width
        key_ratio: PositiveShare = 0.5,  # width of a head's keys as a share of its values'
        rank: Width = 16,  # inner width of the projection to the decays
        temperature: Positive = 16.0,  # root of the sigmoid that a decay is; the more, the longer the memory
        scan: Literal["alternate", "rows"] = "alternate",  # direction: another one in each layer of four, or rows
        kernel: Annotated[int, Ge(1), Le(15)] = 3,  # side of the depthwise convolution; odd, 1 is none
        *,
        dim: int,
    ) -> None:
        super().__init__(dim)
        self.heads, keys = whole_heads(dim, head_dim), whole_heads(dim, head_dim) * hidden_width(key_ratio, head_dim)
        self.temperature, self.scan, self.widths = temperature, scan, [keys, keys, dim, dim]
        self.local = Depthwise(dim, kernel) if kernel > 1 else nn.Identity()
        self.qkvg = nn.Linear(dim, sum(self.widths), bias=False)
        self.decay = nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Linear(rank, keys))
        self.norm = RmsNorm(head_dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        direction = self.order if self.scan == "alternate" else 0
        tokens = read(self.local(x), direction)  # (B, N, C)
        q, k, v, gate = self.qkvg(tokens).split(self.widths, -1)
        decay = F.logsigmoid(widened(self.decay(tokens))) / self.temperature
        mixed = gated_linear(*(t.unflatten(-1, (self.heads, -1)) for t in (q, k, v, decay)))
        out = self.proj(self.norm(mixed).flatten(2) * F.silu(gate))
        return saturated(write(out, x.shape[1], x.shape[2], direction))


def gated_linear(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, chunk: int = CHUNK) -> Tensor:
    """The recurrence in chunks: q, k and log decays (B, N, H, K), at most 0; v (B, N, H, D) -> (B, N, H, D).

    A log decay below MIN_LOG_DECAY counts as that. Everything is float32, or float64 where v is.
    """
    dtype, tokens = v.dtype, v.shape[1]
    with no_autocast(v.device):
        q, k, v, decay = (chunked(widened(t), chunk) for t in (q, k, v, log_decay.clamp(min=MIN_LOG_DECAY)))
        total = decay.cumsum(-2)  # (B, H, M, C, K): log of the decay since the chunk began
        middle, last = total[..., (chunk - 1) // 2, None, :], total[..., -1:, :]
        pairs = (q * (total - middle).exp()) @ (k * (middle - total).exp()).mT  # (B, H, M, C, C)
        states = _prefix(last.squeeze(-2).exp(), (k * (last - total).exp()).mT @ v)
        before = F.pad(states[..., :-1, :, :], (0, 0, 0, 0, 1, 0))  # (B, H, M, K, D) at each chunk's beginning
        out = pairs.tril() @ v + (q * total.exp()) @ before
        return joined(out, tokens).to(dtype)


def _prefix(decay: Tensor, states: Tensor) -> Tensor:
    """S_m = decay_m S_(m-1) + states_m for all M chunks in log2(M) steps: (B, H, M, K), (B, H, M, K, D)."""
    step = 1
    while step < states.shape[2]:
        states = states + decay[..., None] * F.pad(states[:, :, :-step], (0, 0, 0, 0, step, 0))
        decay = decay * F.pad(decay[:, :, :-step], (0, 0, step, 0))
        step *= 2
    return states
