"""Probe of two attentions with equal parameters: the mixing, the layer, and a forward of the DiT."""

from collections.abc import Mapping
from contextlib import nullcontext
from math import ceil
from typing import Annotated, Any, NamedTuple, cast, final

import torch
from torch import Tensor, nn

from sana_lab.bench.probes import Dtype, Probe, ProbeSettings
from sana_lab.config import specs
from sana_lab.config.ranges import BatchSize, Count, Depth, Width
from sana_lab.config.specs import Spec, SpecError, build
from sana_lab.costs.flops import count_macs, count_parameters
from sana_lab.costs.timing import (
    MAX_NOISE,
    MIN_READING_S,
    Call,
    Clock,
    Timing,
    clock_for,
    collect_samples,
    median_interval,
    quantile,
    repeated,
)
from sana_lab.models.attention import Attention
from sana_lab.types import Text

SCOPES = ("core", "core_train", "layer", "step")
"""core: mixing of q, k, v; core_train: with gradients; layer: with projections; step: a denoiser forward."""

CHANNELS, TEXT = 32, 32
"""Latent channels, as in DC-AE; number of text tokens and their width."""


class PairTiming(NamedTuple):
    """Two calls timed in turns, the first one twice per round."""

    first: Timing
    second: Timing
    ratio: float | None  # first / second, median over rounds; None if `noise` exceeds MAX_NOISE
    low: float  # 95 % interval of the ratio
    high: float
    noise: float  # |first / first again - 1|, of the minima

    def columns(self, scope: str, names: tuple[str, str]) -> dict[str, float]:
        columns: dict[str, float] = {f"{scope}_noise": self.noise}
        for name, timing in zip(names, (self.first, self.second), strict=True):
            columns |= {f"{name}_{scope}_ms": 1e3 * timing.median_s}
            columns |= {f"{name}_{scope}_ms_low": 1e3 * timing.low_s, f"{name}_{scope}_ms_high": 1e3 * timing.high_s}
        ratio = {f"{scope}_ratio": self.ratio, f"{scope}_ratio_low": self.low, f"{scope}_ratio_high": self.high}
        return columns if self.ratio is None else {**columns, **{k: v for k, v in ratio.items() if v is not None}}


def square_side(tokens: int) -> int:
    """Side of a square grid of that many tokens. SpecError if there is none."""
    side = round(tokens**0.5)
    if side < 1 or side * side != tokens:
        raise SpecError(f"tokens is {tokens}, expected a square number, such as {max(1, side) ** 2}")
    return side


@final
class AttentionPair(Probe):
    """Two attentions with equal parameters, timed in turns; a ratio above 1 means that the second is faster."""

    inside = "core: the mixing of q, k, v; core_train: with its gradients; layer: with projections; step: a DiT forward"

    def __init__(
        self,
        first: Annotated[Spec, "attention"] = "softmax",  # numerator of the ratio
        second: Annotated[Spec, "attention"] = "linear",  # denominator; differs from `first`
        tokens: Count = 1024,  # number of image tokens, a square number
        dim: Width = 128,  # width of the layer and the DiT
        depth: Depth = 2,  # blocks of the DiT in scope `step`
        cross_heads: Width = 4,  # heads of its cross-attention
        batch: BatchSize = 1,  # images
        dtype: Dtype = "float32",  # of weights and activations
    ) -> None:
        side = square_side(tokens)
        self.specs = {specs.name_of(spec): spec for spec in (first, second)}
        for name in self.specs:
            if not issubclass(cast(type, specs.find("attention", name)), Attention):
                raise SpecError(
                    f"attention {name!r} mixes no q, k and v; expected such as softmax; probe mixer takes any"
                )
        if len(self.specs) < 2:
            raise SpecError(f"both attentions are {specs.name_of(first)!r}, expected two of different names")
        self.tokens, self.side, self.dim, self.batch, self.dtype = tokens, side, dim, batch, dtype
        self.dit = {"name": "sana", "dim": dim, "depth": depth, "cross_heads": cross_heads}

    @property
    def names(self) -> tuple[str, str]:
        first, second = self.specs
        return first, second

    def count(self) -> dict[str, float]:
        """GMACs of scopes `core` and `step` by attention, for the whole batch. SpecError if parameters differ."""
        columns: dict[str, float] = {"tokens": self.tokens}
        for name, scopes in self._calls(torch.device("meta")).items():
            columns |= {f"{name}_{scope}_gmacs": count_macs(scopes[scope]) / 1e9 for scope in ("core", "step")}
        sizes = {count_parameters(self._step(name, torch.device("meta")))["total"] for name in self.names}
        if len(sizes) > 1:
            raise SpecError(f"{' and '.join(self.names)} differ in the number of parameters: {sorted(sizes)}")
        return {**columns, "params_m": sizes.pop() / 1e6}

    def measure(self, settings: ProbeSettings) -> dict[str, float]:
        calls = self._calls(settings.device)
        columns: dict[str, float] = {}
        for scope in SCOPES:
            pair = {name: scopes[scope] for name, scopes in calls.items()}
            with nullcontext() if scope == "core_train" else torch.no_grad():
                columns |= compare(pair, settings).columns(scope, self.names)
        return columns

    def _calls(self, device: torch.device) -> dict[str, dict[str, Call]]:
        """name -> scope -> call; both on the same random inputs."""
        dtype = getattr(torch, self.dtype)
        x = normal((self.batch, self.side, self.side, self.dim), device, dtype)
        latents = normal((self.batch, CHANNELS, self.side, self.side), device, dtype)
        tokens, mask = normal((self.batch, TEXT, TEXT), device, dtype), torch.ones(self.batch, TEXT, dtype=torch.bool)
        text, t = Text(tokens, mask.to(device)), torch.full((self.batch,), 0.5, device=device, dtype=dtype)
        return {name: self._scopes(self._step(name, device), x, latents, t, text) for name in self.specs}

    def _scopes(self, step: Any, x: Tensor, latents: Tensor, t: Tensor, text: Text) -> dict[str, Call]:
        layer = step.blocks[0].attention
        shape = (self.batch, self.tokens, 3, layer.heads, self.dim // layer.heads)
        qkv, leaf = (normal(shape, x.device, x.dtype).requires_grad_(grad) for grad in (False, True))
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
            dit = build("dit", {**self.dit, "attention": self.specs[name]}, channels=CHANNELS, text_dim=TEXT)
        return dit.to(device, getattr(torch, self.dtype)).requires_grad_(False).eval()


def compare(pair: Mapping[str, Call], settings: ProbeSettings, clock: Clock | None = None) -> PairTiming:
    """Time two calls in turns (first, second, first again); each reading repeats its call for MIN_READING_S."""
    first, second = pair.values()
    read = clock or clock_for(settings.device)
    calls = {"first": first, "second": second, "again": first}
    repeats = {name: max(1, ceil(MIN_READING_S / max(read(call)[0], 1e-9))) for name, call in calls.items()}
    repeats["again"] = repeats["first"]
    loops = {name: repeated(call, repeats[name]) for name, call in calls.items()}
    samples = collect_samples(loops, settings.warmup, settings.repeats, settings.device, clock)
    seconds = {name: tuple(s / repeats[name] for s in samples[name].wall) for name in calls}
    ratios = [a / b for a, b in zip(seconds["first"], seconds["second"], strict=True)]
    noise = abs(min(seconds["first"]) / min(seconds["again"]) - 1)
    ratio = quantile(ratios, 0.5) if noise <= MAX_NOISE else None
    timings = (Timing.of(seconds["first"]), Timing.of(seconds["second"]))
    return PairTiming(*timings, ratio, *median_interval(ratios), noise)


def normal(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """The same normal numbers on each device; empty on the meta device."""
    if device.type == "meta":
        return torch.empty(shape, device=device, dtype=dtype)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
