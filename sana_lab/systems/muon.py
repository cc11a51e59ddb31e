"""Muon (Jordan et al. 2024; scale of Liu et al. 2025, arXiv 2502.16982): orthogonalised momentum for hidden matrices.

Hidden weights are stepped by the nearest semi-orthogonal matrix to their momentum, all other parameters (embeddings,
first and last layers, norms, biases) by AdamW. On the shapes world it needs about half of AdamW's samples.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from math import sqrt
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from sana_lab.config.ranges import Count, Decay, Nonnegative, Positive
from sana_lab.config.specs import AsBefore
from sana_lab.systems.steps import GroupSteps

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Jordan's quintic Newton-Schulz iteration
RMS = 0.2  # of an orthogonalised step, as in AdamW's steps
HIDDEN = (".blocks.", ".block.", ".layers.")  # names of the lists of blocks in DiT, T5 and decoder-only models


class Muon(GroupSteps):
    """Muon for hidden matrices, AdamW for the rest, in one optimiser of two parameter groups.

    A matrix (n, m) moves by `muon_lr` 0.2 sqrt(max(n, m)) times its orthogonalised momentum; a convolution's kernel is
    the matrix (out, in k k), and depthwise kernels take AdamW. ValueError without any hidden matrix.
    """

    takes_names = True  # built with (name, parameter) pairs

    def __init__(
        self,
        params: Iterable[tuple[str, nn.Parameter]],
        lr: Positive = 2e-3,  # learning rate of AdamW
        muon_lr: Positive = 5e-3,  # learning rate of hidden matrices
        momentum: Decay = 0.95,  # of hidden matrices, in [0, 1); Nesterov's
        iterations: Count = 5,  # of Newton-Schulz, from 1
        betas: Sequence[float] = (0.9, 0.99),  # decay of AdamW's averages of gradient and square
        eps: Positive = 1e-8,  # of AdamW
        weight_decay: Nonnegative = 0.01,  # of both, times the learning rate
        # Newton-Schulz in bfloat16, as Jordan's; twice as fast on CPUs with AVX-512 BF16. False: the weights' dtype.
        half: Annotated[bool, AsBefore(False)] = False,
    ) -> None:
        pairs = list(params)
        hidden = [p for name, p in pairs if is_hidden(name, p)]
        rest = [p for name, p in pairs if not is_hidden(name, p)]
        if not hidden:
            raise ValueError(f"muon: none of {len(pairs)} parameters is a hidden matrix; expected names with {HIDDEN}")
        groups = [
            {"params": hidden, "lr": muon_lr, "muon": True},
            {"params": rest, "lr": lr, "muon": False},
        ]
        defaults = {"momentum": momentum, "iterations": iterations, "betas": tuple(betas), "eps": eps, "half": half}
        super().__init__([g for g in groups if g["params"]], {"lr": lr, "weight_decay": weight_decay, **defaults})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, of AdamW unless it says `muon`."""
        super().add_param_group({"muon": False, **param_group})

    def step_group(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        (self._step_hidden if group["muon"] else self._step_rest)(parameters, group)

    def _step_hidden(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Matrices of one shape are orthogonalised together."""
        by_shape = defaultdict(list)
        for p in parameters:
            by_shape[p.shape].append(p)
        for same in by_shape.values():
            momenta = torch.stack([self._nesterov(p, group["momentum"]).flatten(1) for p in same])
            products = momenta.bfloat16() if group.get("half") else momenta  # older checkpoints have no `half`
            updates = orthogonal(products, group["iterations"]).to(momenta.dtype)
            scale = group["lr"] * RMS * sqrt(max(updates.shape[1:]))
            torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(same, [u.view_as(p) for u, p in zip(updates, same, strict=True)], alpha=-scale)

    def _nesterov(self, p: Tensor, decay: float) -> Tensor:
        state, gradient = self.state[p], p.grad
        assert gradient is not None
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        return gradient + decay * state["momentum"].mul_(decay).add_(gradient)

    def _step_rest(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """AdamW (Loshchilov and Hutter, arXiv 1711.05101)."""
        if not parameters:
            return
        for p in parameters:
            if not self.state[p]:
                zeros = {"mean": torch.zeros_like(p), "square": torch.zeros_like(p)}
                self.state[p].update(zeros, step=torch.zeros(()))
        states, gradients = [self.state[p] for p in parameters], [p.grad for p in parameters if p.grad is not None]
        (a, b), rate = group["betas"], group["lr"]
        means, squares = [s["mean"] for s in states], [s["square"] for s in states]
        torch._foreach_add_([s["step"] for s in states], 1)
        n = float(states[0]["step"])
        torch._foreach_lerp_(means, gradients, 1 - a)
        torch._foreach_mul_(squares, b)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - b)
        spread = torch._foreach_sqrt(torch._foreach_div(squares, 1 - b**n))
        torch._foreach_add_(spread, group["eps"])
        torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
        torch._foreach_addcdiv_(parameters, means, spread, -rate / (1 - a**n))


def is_hidden(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon steps a parameter: a weight of two or more dimensions in a block, no depthwise kernel or table."""
    matrix = parameter.ndim >= 2 and parameter.shape[1] > 1 and name.endswith("weight")
    return matrix and "relative" not in name and any(part in f".{name}" for part in HIDDEN)


def orthogonal(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Matrices (B, n, m) with their singular values moved near 1 (between 0.7 and 1.2), singular vectors kept."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
