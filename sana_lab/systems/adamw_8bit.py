"""AdamW (arXiv 1711.05101) with both averages in 8 bits (arXiv 2110.02861)."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sana_lab.config.ranges import Nonnegative, Positive
from sana_lab.systems import eight_bit


class AdamW8bit(eight_bit.TypedState):
    """AdamW whose averages of gradient and square are in 8 bits for large parameters, in float32 for small ones.

    Needs the extra `quantize`. State weighs 2 bytes a parameter, against 8 of AdamW.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: Positive = 1e-3,  # learning rate
        betas: Sequence[float] = (0.9, 0.999),  # decay of the averages of gradient and square
        eps: Positive = 1e-8,  # added to the root of the square
        weight_decay: Nonnegative = 0.01,  # times the learning rate
    ) -> None:
        eight_bit.check("adamw_8bit")
        if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
            raise ValueError(f"adamw_8bit: betas are {list(betas)}; expected two numbers in [0, 1)")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    def step_group(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for p in parameters:
            if p.grad is not None:
                self._step(p, p.grad.float(), group)

    def _step(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros(())
            state.update({f"mean_{k}": v for k, v in _zeros(p).items()})
            state.update({f"square_{k}": v for k, v in _zeros(p).items()})
        state["step"] += 1
        (a, b), n = group["betas"], float(state["step"])
        mean = _averaged(state, "mean_", gradient, a)
        square = _averaged(state, "square_", gradient.square(), b)
        spread = (square / (1 - b**n)).sqrt_().add_(group["eps"])
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_((mean / spread).to(p.dtype), alpha=-group["lr"] / (1 - a**n))


def _zeros(p: Tensor) -> dict[str, Tensor]:
    return eight_bit.zeros(p) if eight_bit.fits(p) else {"values": torch.zeros_like(p, dtype=torch.float32)}


def _averaged(state: dict[str, Tensor], prefix: str, value: Tensor, decay: float) -> Tensor:
    """Update the average of that name with a value; the result in float32, before it is rounded to 8 bits."""
    if f"{prefix}values" in state:
        return state[f"{prefix}values"].lerp_(value, 1 - decay)
    codes = {k: state[prefix + k] for k in ("codes", "scale")}
    signed = prefix == "mean_"
    average = eight_bit.read(codes, signed).view_as(value).lerp_(value, 1 - decay)
    eight_bit.write(codes, average, signed)
    return average
