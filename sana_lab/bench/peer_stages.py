"""Costs of a diffusers pipeline, in total and by network call."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from torch import Tensor

from sana_lab.bench.record import STAGES, Costs, Latency
from sana_lab.costs.flops import count_macs
from sana_lab.costs.live_memory import Memory, module_tensors, peak_memory
from sana_lab.costs.nvml import NvmlDevice
from sana_lab.costs.timing import Call, Clock, Energy, Samples, clock_for, collect_samples, energy_per_call

if TYPE_CHECKING:
    from sana_lab.peers.pipeline import Peer

T = TypeVar("T")


class PeerSettings(NamedTuple):
    """Sampling and timing options of a peer."""

    size: int  # pixels a side
    steps: int | None  # None is the pipeline's default, as for guidance
    guidance: float | None
    repeats: int
    warmup: int
    gpu: NvmlDevice | None = None
    energy_s: float = 0.0  # seconds to repeat a call for measuring energy; 0 disables it
    clock: Clock | None = None

    def call(self, peer: "Peer", prompts: Sequence[str]) -> Call:
        """One call of the pipeline for a batch of images."""
        options: Any = {"size": self.size, "steps": self.steps, "guidance": self.guidance, "batch": len(prompts)}
        return partial(peer.sample, prompts, **options)

    def memory(self, peer: "Peer", prompts: Sequence[str]) -> Memory:
        """Peak memory of the whole pipeline."""
        return peak_memory(self.call(peer, prompts), peer.device, module_tensors(peer.networks.values()))

    def energy(self, peer: "Peer", prompts: Sequence[str]) -> Energy | None:
        """Energy of a batch; None without a counter."""
        if self.gpu is None or not self.energy_s:
            return None
        return energy_per_call(self.call(peer, prompts), self.gpu.joules, self.energy_s, self.clock_for(peer))

    def clock_for(self, peer: "Peer") -> Clock:
        return self.clock or clock_for(peer.device)


class StageSeconds(NamedTuple):
    """Time in the networks of each stage and number of calls, for one run."""

    seconds: dict[str, float]
    calls: dict[str, int]


def measure_call(measure: Callable[[Call], T], call: Call) -> tuple[T, Any]:
    """(the result of `measure`, which runs the call once; the call's own result)."""
    out: list[Any] = []
    return measure(lambda: out.append(call())), out[0]


def time_peer(peer: "Peer", settings: PeerSettings, prompts: Sequence[str]) -> Latency:
    """Latency of the whole pipeline."""
    call = settings.call(peer, prompts)
    clock = settings.clock_for(peer)
    return Latency.of(collect_samples({"": call}, settings.warmup, settings.repeats, peer.device, clock)[""])


def measure_peer(
    peer: "Peer", settings: PeerSettings, one: Sequence[str], many: Sequence[str]
) -> tuple[Costs, int | None]:
    """Costs, with time and MACs for the batch `one` and memory for the batch `many`; and the length of text features.

    Runs a cold pass by stage, then the whole pipeline without hooks, then the stages again, warm.
    """
    cold = time_stages(peer, settings, one) if settings.warmup else None
    total = time_peer(peer, settings, one)
    rounds = [time_stages(peer, settings, one) for _ in range(settings.repeats)]
    stages = {
        stage: Latency.of(Samples(tuple(r.seconds[stage] for r in rounds), (), cold.seconds[stage] if cold else None))
        for stage in STAGES
        if rounds[0].calls[stage]
    }
    latency = {**stages, "total": total._replace(first=sum(cold.seconds.values()) if cold else None)}
    gmacs, tokens = count_peer(peer, settings, one)
    energy = {"total": settings.energy(peer, one)}
    return Costs(latency, gmacs, memory_by_stage(peer, settings, many), energy), tokens


def time_stages(peer: "Peer", settings: PeerSettings, prompts: Sequence[str]) -> StageSeconds:
    """Time in the networks of each stage, the device synchronised around every call."""
    totals = StageSeconds(dict.fromkeys(STAGES, 0.0), dict.fromkeys(STAGES, 0))
    clock = settings.clock_for(peer)

    def watch(stage: str, call: Call) -> Any:
        (seconds, _), out = measure_call(clock, call)
        totals.seconds[stage] += seconds
        totals.calls[stage] += 1
        return out

    with peer.watching(watch):
        settings.call(peer, prompts)()
    return totals


def count_peer(peer: "Peer", settings: PeerSettings, prompts: Sequence[str]) -> tuple[dict[str, float], int | None]:
    """GMACs of a batch by stage, in "total", and of a denoiser "forward" with guidance 1; and the text's length."""
    gmacs = dict.fromkeys(STAGES, 0.0)
    lengths: list[int] = []

    def watch(stage: str, call: Call) -> Any:
        macs, out = measure_call(count_macs, call)
        gmacs[stage] += macs / 1e9
        lengths.extend(_length(out) if stage == "text" else [])
        return out

    with peer.watching(watch):
        total = count_macs(settings.call(peer, prompts)) / 1e9
    forward = _forward_gmacs(peer, settings, prompts[:1])
    return {**gmacs, "total": total, "forward": forward}, max(lengths, default=None)


def memory_by_stage(peer: "Peer", settings: PeerSettings, prompts: Sequence[str]) -> dict[str, Memory]:
    """Peak memory of each stage's first call, and of the whole."""
    weights = module_tensors(peer.networks.values())
    peaks: dict[str, Memory] = {}

    def watch(stage: str, call: Call) -> Any:
        if stage in peaks:
            return call()
        peaks[stage], out = measure_call(lambda c: peak_memory(c, peer.device, weights), call)
        return out

    with peer.watching(watch):
        two_steps(peer, settings).call(peer, prompts)()
    return {**peaks, "total": settings.memory(peer, prompts)}


def _forward_gmacs(peer: "Peer", settings: PeerSettings, prompts: Sequence[str]) -> float:
    """GMACs of one denoiser call without guidance: the mean over the calls of two steps."""
    counts: list[int] = []

    def watch(stage: str, call: Call) -> Any:
        if stage != "denoise":
            return call()
        macs, out = measure_call(count_macs, call)
        counts.append(macs)
        return out

    with peer.watching(watch):
        two_steps(peer, settings, guidance=1.0).call(peer, prompts)()
    return sum(counts) / len(counts) / 1e9 if counts else float("nan")


def two_steps(peer: "Peer", settings: PeerSettings, **changes: Any) -> PeerSettings:
    """Settings with two steps and other `changes`, restricted to arguments that the pipeline accepts."""
    arguments = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
    changes = {"steps": 2, **changes}
    return settings._replace(**{name: value for name, value in changes.items() if arguments[name] in peer.accepts})


def _length(output: Any) -> list[int]:
    """Numbers of tokens of a text encoder's features; empty if it returns only pooled features."""
    features = getattr(output, "last_hidden_state", output[0] if isinstance(output, tuple) else None)
    return [features.shape[1]] if isinstance(features, Tensor) and features.ndim == 3 else []
