"""CAME (Luo et al., arXiv 2307.02047, algorithm 2): Adafactor's memory with a confidence in each update; SANA's choice.

Of a matrix (n, m) the second moment and the instability of updates are kept as n + m values each, so that the first
moment is all of its size.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sana_lab.config.ranges import Nonnegative, Positive
from sana_lab.systems import eight_bit

CHUNK = 2**26
"""Values that are stepped together: their temporary copies are a few times as large."""


class Came(eight_bit.TypedState):
    """CAME for matrices and 1x1 convolutions; other parameters have a whole second moment and no confidence.

    State is in float32 for parameters of any type. `bits: 8` keeps the first moment of large matrices in 8 bits
    (torchao), as in SANA-1.5's CAME-8bit.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: Positive = 1e-4,  # learning rate
        betas: Sequence[float] = (0.9, 0.999, 0.9999),  # decay of the averages of update, square and instability
        eps: Sequence[float] = (1e-30, 1e-16),  # added to the square and to the instability
        clip: Positive = 1.0,  # largest root mean square of an update before it is averaged
        weight_decay: Nonnegative = 0.0,  # times the learning rate
        bits: Literal[32, 8] = 32,  # of the first moment; 8 needs the extra `quantize`
    ) -> None:
        if len(betas) != 3 or not all(0 <= b < 1 for b in betas):
            raise ValueError(f"came: betas are {list(betas)}; expected three numbers in [0, 1)")
        if len(eps) != 2 or not all(e > 0 for e in eps):
            raise ValueError(f"came: eps is {list(eps)}; expected two numbers above 0")
        if bits == 8:
            eight_bit.check("came with bits: 8")
        options = {"lr": lr, "betas": tuple(betas), "eps": tuple(eps), "clip": clip, "weight_decay": weight_decay}
        super().__init__(params, {**options, "bits": bits})

    def step_group(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for factored in (True, False):
            for chunk in _chunks(p for p in parameters if is_matrix(p) == factored):
                self._step(chunk, factored, group)

    def _step(self, parameters: list[Tensor], factored: bool, group: dict[str, Any]) -> None:
        """A step of parameters that are all matrices, or all others."""
        b1, b2, b3 = group["betas"]
        states = [self._state(p, factored, group["bits"]) for p in parameters]
        gradients = [_flat(p.grad).float() for p in parameters if p.grad is not None]
        squares = torch._foreach_mul(gradients, gradients)
        torch._foreach_add_(squares, group["eps"][0])
        if factored:
            updates = _scaled(gradients, states, ("row", "column"), squares, b2)
        else:
            moments = [s["square"] for s in states]
            torch._foreach_lerp_(moments, squares, 1 - b2)
            updates = list(torch._foreach_div(gradients, torch._foreach_sqrt(moments)))
        rms = [norm / u.numel() ** 0.5 for norm, u in zip(torch._foreach_norm(updates), updates, strict=True)]
        torch._foreach_div_(updates, [(r / group["clip"]).clamp(min=1.0) for r in rms])
        means = [_mean(s, u) for s, u in zip(states, updates, strict=True)]
        torch._foreach_lerp_(means, updates, 1 - b1)
        for state, mean in zip(states, means, strict=True):
            if "codes" in state:
                eight_bit.write(state, mean, signed=True)
        if factored:
            torch._foreach_sub_(updates, means)
            instability = torch._foreach_mul(updates, updates)
            torch._foreach_add_(instability, group["eps"][1])
            means = _scaled(means, states, ("unstable_row", "unstable_column"), instability, b3)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        steps = [m.view_as(p).to(p.dtype) for m, p in zip(means, parameters, strict=True)]
        torch._foreach_add_(parameters, steps, alpha=-group["lr"])

    def _state(self, p: Tensor, factored: bool, bits: int) -> dict[str, Tensor]:
        """The state of a parameter, zeros at first."""
        state: dict[str, Tensor] = self.state[p]
        if not state:
            flat = _flat(p)
            eight = bits == 8 and factored and eight_bit.fits(p)
            state.update(eight_bit.zeros(p) if eight else {"mean": torch.zeros_like(flat, dtype=torch.float32)})
            if factored:
                n, m = (torch.zeros(k, device=p.device) for k in flat.shape)
                state.update(row=n, column=m, unstable_row=n.clone(), unstable_column=m.clone())
            else:
                state["square"] = torch.zeros_like(flat, dtype=torch.float32)
        return state


def is_matrix(p: Tensor) -> bool:
    """Whether the second moment of a parameter is factored: a matrix, or the kernel of a 1x1 convolution."""
    return p.ndim == 2 or (p.ndim == 4 and p.shape[2:] == (1, 1))


def _flat(p: Tensor) -> Tensor:
    """A matrix (n, m) of a matrix or of a 1x1 convolution's kernel (n, m, 1, 1); others as they are."""
    return p.flatten(1) if p.ndim == 4 and is_matrix(p) else p


def _mean(state: dict[str, Tensor], like: Tensor) -> Tensor:
    """The first moment in float32: the state itself, or read from 8 bits."""
    return eight_bit.read(state, signed=True).view_as(like) if "codes" in state else state["mean"]


def _scaled(
    values: list[Tensor],
    states: list[dict[str, Tensor]],
    names: tuple[str, str],
    squares: Sequence[Tensor],
    beta: float,
) -> list[Tensor]:
    """Values (n, m) over the root of the average of `squares`, of which `names` are the means of rows and columns."""
    rows, columns = ([s[name] for s in states] for name in names)
    torch._foreach_lerp_(rows, [s.mean(1) for s in squares], 1 - beta)
    torch._foreach_lerp_(columns, [s.mean(0) for s in squares], 1 - beta)
    left = [(r / r.mean()).rsqrt()[:, None] for r in rows]
    right = [c.rsqrt()[None] for c in columns]
    return [v * r * c for v, r, c in zip(values, left, right, strict=True)]


def _chunks(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Lists of parameters of at most `CHUNK` values, or of one."""
    chunk: list[Tensor] = []
    for p in parameters:
        if chunk and sum(q.numel() for q in chunk) + p.numel() > CHUNK:
            yield chunk
            chunk = []
        chunk.append(p)
    if chunk:
        yield chunk
