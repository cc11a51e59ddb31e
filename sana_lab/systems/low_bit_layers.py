"""Linear layers of 8-bit floats, and of 4 bits with SVDQuant's low-rank correction (arXiv 2411.05007), simulated."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_lab.ops.low_bits import e4m3_matmul, e4m3_product, e4m3_rows, int4, nvfp4

ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {"int4_simulated": int4, "nvfp4_simulated": nvfp4}
"""Mode -> its rounding of weights and activations."""


class Fp8Linear(nn.Module):
    """A linear layer whose input is rounded to e4m3 for each token, and its weight for each output channel.

    `simulated` multiplies the rounded values in float32 on any device; else in one kernel, with bfloat16 results.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, layer: nn.Linear, simulated: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.simulated = layer.in_features, layer.out_features, simulated
        weight, scale = e4m3_rows(layer.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N) in the dtype of x."""
        values, scale = e4m3_rows(x.flatten(0, -2))
        multiply = e4m3_product if self.simulated else e4m3_matmul
        out = multiply(values, scale, self.weight, self.scale, self.bias)
        return out.to(x.dtype).unflatten(0, x.shape[:-1])


class LowRankLinear(nn.Module):
    """x W = x' L1 L2 + Q(x') Q(W' - L1 L2), where x' = x / smooth, W' = smooth W, and L1 L2 is the best of `rank`.

    Q rounds to 4 bits; all products are in the dtype of x.
    """

    smooth: Tensor
    residual: Tensor
    down: Tensor
    up: Tensor

    def __init__(self, layer: nn.Linear, rounding: Callable[[Tensor], Tensor], rank: int, smooth: Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rounding = layer.in_features, layer.out_features, rounding
        weight = layer.weight.detach().float() * smooth  # (N, K)
        up, values, down = torch.linalg.svd(weight, full_matrices=False)
        down = values[:rank, None] * down[:rank]
        for name, tensor in (("down", down), ("up", up[:, :rank]), ("smooth", smooth)):
            self.register_buffer(name, tensor.to(layer.weight))
        self.register_buffer("residual", rounding(weight - up[:, :rank] @ down).to(layer.weight))
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        x = x / self.smooth
        return F.linear(F.linear(x, self.down), self.up) + F.linear(self.rounding(x), self.residual, self.bias)


def smoothing(activations: Tensor, weight: Tensor) -> Tensor:
    """(K,) sqrt(largest |input| / largest |weight|) of each input channel: what moves outliers to the weight."""
    smooth = (activations.float().clamp(min=1e-5) / weight.float().abs().amax(0).clamp(min=1e-5)).sqrt()
    return smooth.clamp(1e-4, 1e4)


def largest_inputs(layers: dict[str, nn.Module], run: Callable[[], object]) -> dict[str, Tensor]:
    """Largest magnitude (K,) of each input channel of layers while `run` runs."""
    largest: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            size = inputs[0].detach().float().abs().flatten(0, -2).amax(0)
            largest[name] = torch.maximum(largest[name], size) if name in largest else size

        return record

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return largest
