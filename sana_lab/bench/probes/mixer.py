"""Probe of one mixer of tokens: a layer with its projections, forward and with gradients."""

from math import ceil
from typing import Annotated, Any, final

import torch

from sana_lab.bench.probes import Dtype, Probe, ProbeSettings
from sana_lab.bench.probes.attention import normal, square_side
from sana_lab.config.ranges import BatchSize, Count, Width
from sana_lab.config.specs import Spec, build
from sana_lab.costs.flops import count_macs, count_parameters
from sana_lab.costs.timing import MIN_READING_S, Call, Timing, clock_for, collect_samples, repeated


@final
class MixerProbe(Probe):
    """Any mixer at a number of tokens, also one with parameters of its own, which the probe `attention` cannot pair."""

    inside = "a layer with its projections, in inference and with all its gradients"

    def __init__(
        self,
        mixer: Annotated[Spec, "attention"] = "linear",  # the mixer
        tokens: Count = 1024,  # number of image tokens, a square number
        dim: Width = 128,  # width of the layer
        batch: BatchSize = 1,  # images
        dtype: Dtype = "float32",  # of weights and activations
    ) -> None:
        side = square_side(tokens)
        self.mixer, self.tokens, self.dtype = mixer, tokens, dtype
        self.shape = (batch, side, side, dim)

    def count(self) -> dict[str, float]:
        """Parameters of the layer, and MACs of its forward for the whole batch."""
        layer, forward, _ = self._calls(torch.device("meta"))
        with torch.no_grad():
            macs = count_macs(forward)
        return {"tokens": self.tokens, "params_m": count_parameters(layer)["total"] / 1e6, "gmacs": macs / 1e9}

    def measure(self, settings: ProbeSettings) -> dict[str, float]:
        _, forward, train = self._calls(settings.device)
        with torch.no_grad():
            columns = _columns("layer", forward, settings)
        return {**columns, **_columns("layer_train", train, settings)}

    def _calls(self, device: torch.device) -> tuple[Any, Call, Call]:
        """The layer, its forward, and its forward with the gradients of input and parameters."""
        dtype = getattr(torch, self.dtype)
        with device:
            layer = build("attention", self.mixer, dim=self.shape[-1]).to(dtype)
        x, pull = normal(self.shape, device, dtype), normal(self.shape, device, dtype)
        leaves = [x.clone().requires_grad_(), *layer.parameters()]

        def train() -> None:
            torch.autograd.grad(layer(leaves[0]), leaves, pull, allow_unused=True)

        return layer, lambda: layer(x), train


def _columns(name: str, call: Call, settings: ProbeSettings) -> dict[str, float]:
    """Milliseconds of a call, median and interval; a reading repeats the call for MIN_READING_S."""
    first, _ = clock_for(settings.device)(call)
    count = max(1, ceil(MIN_READING_S / max(first, 1e-9)))
    samples = collect_samples({"": repeated(call, count)}, settings.warmup, settings.repeats, settings.device)[""]
    timing = Timing.of([seconds / count for seconds in samples.wall])
    ends = {f"{name}_ms_low": 1e3 * timing.low_s, f"{name}_ms_high": 1e3 * timing.high_s}
    return {f"{name}_ms": 1e3 * timing.median_s, **ends}
