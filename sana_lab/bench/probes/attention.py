"""Two attentions of equal parameters over a number of tokens: the mixing alone, the layer, and a step of the DiT."""

from collections.abc import Mapping
from contextlib import nullcontext
from math import ceil
from typing import Annotated, Any, NamedTuple, final

import torch
from torch import Tensor, nn

from sana_lab.bench.probes import Dtype, How, Probe
from sana_lab.checkpoints.build import build
from sana_lab.config import specs
from sana_lab.config.specs import Spec, SpecError
from sana_lab.costs.flops import count_macs, parameters
from sana_lab.costs.timing import NOISE, Call, Clock, Timing, clock_of, median_interval, quantile, sample
from sana_lab.types import Text

SCOPES = ("core", "core_train", "layer", "step")
"""The mixing of q, k, v; that with its gradients; with the projections around it; a denoiser forward."""

CHANNELS, TEXT = 32, 32
"""Of the latents, as in DC-AE; of the text, which the step reads as well: tokens, and features of each."""

LEAST_S = 0.05
"""A call that is shorter is repeated within one reading of the clock."""


class Compared(NamedTuple):
    """Two calls that took turns, with the first one again."""

    first: Timing
    second: Timing
    ratio: float | None  # first / second; None where the first differs from itself by more than NOISE
    low: float
    high: float  # the 95 % interval of the ratio's median over rounds
    noise: float

    def plain(self, scope: str, names: tuple[str, str]) -> dict[str, float]:
        found: dict[str, float] = {f"{scope}_noise": self.noise}
        for name, timing in zip(names, (self.first, self.second), strict=True):
            found |= {f"{name}_{scope}_ms": 1e3 * timing.median_s}
            found |= {f"{name}_{scope}_ms_low": 1e3 * timing.low_s, f"{name}_{scope}_ms_high": 1e3 * timing.high_s}
        ratio = {f"{scope}_ratio": self.ratio, f"{scope}_ratio_low": self.low, f"{scope}_ratio_high": self.high}
        return found if self.ratio is None else {**found, **{k: v for k, v in ratio.items() if v is not None}}


@final
class AttentionPair(Probe):
    """`first` and `second` over `tokens` (a square number), width `dim`, at `batch`; the step has `depth` blocks.

    They take turns, the first twice in each round; a ratio above 1 says that the second is faster.
    """

    inside = "core: the mixing of q, k, v; core_train: with its gradients; layer: with projections; step: a DiT forward"

    def __init__(
        self,
        first: Annotated[Spec, "attention"] = "softmax",
        second: Annotated[Spec, "attention"] = "linear",
        tokens: int = 1024,
        dim: int = 128,
        depth: int = 2,
        cross_heads: int = 4,
        batch: int = 1,
        dtype: Dtype = "float32",
    ) -> None:
        side = round(tokens**0.5)
        if side < 1 or side * side != tokens:
            raise SpecError(f"tokens is {tokens}, expected a square number, such as {max(1, side) ** 2}")
        self.specs = {specs.name_of(spec): spec for spec in (first, second)}
        if len(self.specs) < 2:
            raise SpecError(f"both attentions are {specs.name_of(first)!r}, expected two of different names")
        self.tokens, self.side, self.dim, self.batch, self.dtype = tokens, side, dim, batch, dtype
        self.dit = {"name": "sana", "dim": dim, "depth": depth, "cross_heads": cross_heads}

    @property
    def names(self) -> tuple[str, str]:
        first, second = self.specs
        return first, second

    def count(self) -> dict[str, float]:
        """Per name: GMACs of the mixing and of a step, of the whole batch; parameters of the two are the same."""
        found: dict[str, float] = {"tokens": self.tokens}
        for name, scopes in self._calls(torch.device("meta")).items():
            found |= {f"{name}_{scope}_gmacs": count_macs(scopes[scope]) / 1e9 for scope in ("core", "step")}
        sizes = {parameters(self._step(name, torch.device("meta")))["total"] for name in self.names}
        if len(sizes) > 1:
            raise SpecError(f"{' and '.join(self.names)} have not as many parameters: {sorted(sizes)}")
        return {**found, "params_m": sizes.pop() / 1e6}

    def measure(self, how: How) -> dict[str, float]:
        calls = self._calls(how.device)
        found: dict[str, float] = {}
        for scope in SCOPES:
            pair = {name: scopes[scope] for name, scopes in calls.items()}
            with nullcontext() if scope == "core_train" else torch.no_grad():
                found |= compare(pair, how).plain(scope, self.names)
        return found

    def _calls(self, device: torch.device) -> dict[str, dict[str, Call]]:
        """name -> scope -> call; both on the same random inputs."""
        dtype = getattr(torch, self.dtype)
        x = _normal((self.batch, self.side, self.side, self.dim), device, dtype)
        latents = _normal((self.batch, CHANNELS, self.side, self.side), device, dtype)
        tokens, mask = _normal((self.batch, TEXT, TEXT), device, dtype), torch.ones(self.batch, TEXT, dtype=torch.bool)
        text, t = Text(tokens, mask.to(device)), torch.full((self.batch,), 0.5, device=device, dtype=dtype)
        return {name: self._scopes(self._step(name, device), x, latents, t, text) for name in self.specs}

    def _scopes(self, step: Any, x: Tensor, latents: Tensor, t: Tensor, text: Text) -> dict[str, Call]:
        layer = step.blocks[0].attention
        shape = (self.batch, self.tokens, 3, layer.heads, self.dim // layer.heads)
        qkv, leaf = (_normal(shape, x.device, x.dtype).requires_grad_(grad) for grad in (False, True))
        with torch.no_grad():
            prepared = step.prepare(text)
        return {
            "core": lambda: layer.mix(*qkv.unbind(2)),
            "core_train": lambda: torch.autograd.grad(layer.mix(*leaf.unbind(2)), leaf, qkv[:, :, 0]),
            "layer": lambda: layer(x),
            "step": lambda: prepared(latents, t),
        }

    def _step(self, name: str, device: torch.device) -> nn.Module:
        with device, torch.no_grad():
            made = build("dit", {**self.dit, "attention": self.specs[name]}, channels=CHANNELS, text_dim=TEXT)
        return made.to(device, getattr(torch, self.dtype)).requires_grad_(False).eval()


def compare(pair: Mapping[str, Call], how: How, clock: Clock | None = None) -> Compared:
    """Two calls in turns, the first one again after the second; each reading holds as many calls as the clock needs."""
    first, second = pair.values()
    read = clock or clock_of(how.device)
    calls = {"first": first, "second": second, "again": first}
    inner = {name: max(1, ceil(LEAST_S / max(read(call)[0], 1e-9))) for name, call in calls.items()}
    inner["again"] = inner["first"]
    repeated = {name: _times(call, inner[name]) for name, call in calls.items()}
    found = sample(repeated, how.warmup, how.repeats, how.device, clock)
    one = {name: tuple(s / inner[name] for s in found[name].wall) for name in calls}
    ratios = sorted(a / b for a, b in zip(one["first"], one["second"], strict=True))
    noise = abs(min(one["first"]) / min(one["again"]) - 1)
    timings = (Timing.of(one["first"]), Timing.of(one["second"]))
    return Compared(*timings, quantile(ratios, 0.5) if noise <= NOISE else None, *median_interval(ratios), noise)


def _times(call: Call, n: int) -> Call:
    def repeated() -> None:
        for _ in range(n):
            call()

    return repeated


def _normal(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    if device.type == "meta":
        return torch.empty(shape, device=device, dtype=dtype)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
