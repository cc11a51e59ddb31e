"""What an image costs a diffusers pipeline: timed, counted and weighed as a whole, and by the calls of its networks."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from sana_lab.bench.record import Costs, Seconds, weights_of
from sana_lab.costs.flops import count_macs
from sana_lab.costs.live_memory import Memory, peak_memory
from sana_lab.costs.nvml import Driver
from sana_lab.costs.timing import Call, Clock, Energy, Samples, clock_of, energy, sample
from sana_lab.peers.pipeline import NETWORKS, Peer

T = TypeVar("T")


class Asked(NamedTuple):
    """How a peer is measured."""

    size: int
    steps: int | None
    guidance: float | None
    repeats: int
    warmup: int
    driver: Driver | None = None
    energy_s: float = 0.0
    clock: Clock | None = None

    def call(self, peer: Peer, prompts: Sequence[str]) -> Call:
        """A batch of images from one call of the pipeline."""
        how: Any = {"size": self.size, "steps": self.steps, "guidance": self.guidance, "batch": len(prompts)}
        return partial(peer.sample, prompts, **how)

    def memory(self, peer: Peer, prompts: Sequence[str]) -> Memory:
        """Of the whole pipeline."""
        return peak_memory(self.call(peer, prompts), peer.device, weights_of(peer.networks.values()))

    def energy(self, peer: Peer, prompts: Sequence[str]) -> Energy | None:
        """Of a batch; None where there is no counter."""
        if self.driver is None or not self.energy_s:
            return None
        return energy(self.call(peer, prompts), self.driver.joules, self.energy_s, self.clock_on(peer))

    def clock_on(self, peer: Peer) -> Clock:
        return self.clock or clock_of(peer.device)


class Seen(NamedTuple):
    """What one run showed, by stage."""

    seconds: dict[str, float]
    calls: dict[str, int]


def both(measure: Callable[[Call], T], call: Call) -> tuple[T, Any]:
    """What a measure says of a call that it runs once, and what the call gave."""
    out: list[Any] = []
    return measure(lambda: out.append(call())), out[0]


def time_peer(peer: Peer, asked: Asked, prompts: Sequence[str]) -> Seconds:
    """Latency of the whole pipeline."""
    call = asked.call(peer, prompts)
    return Seconds.of(sample({"": call}, asked.warmup, asked.repeats, peer.device, asked.clock_on(peer))[""])


def measure_peer(peer: Peer, asked: Asked, one: Sequence[str], many: Sequence[str]) -> tuple[Costs, int | None]:
    """Costs, time and work at the batch of `one`, memory at that of `many`; and how long the text's features are.

    Stages are first seen cold, then the whole is timed without anybody watching, then the stages are timed.
    """
    cold = watched_seconds(peer, asked, one) if asked.warmup else None
    total = time_peer(peer, asked, one)
    rounds = [watched_seconds(peer, asked, one) for _ in range(asked.repeats)]
    stages = {
        stage: Seconds.of(Samples(tuple(r.seconds[stage] for r in rounds), (), cold.seconds[stage] if cold else None))
        for stage in NETWORKS
        if rounds[0].calls[stage]
    }
    seconds = {**stages, "total": total._replace(first=sum(cold.seconds.values()) if cold else None)}
    macs, tokens = count_peer(peer, asked, one)
    return Costs(seconds, macs, memory_by_stage(peer, asked, many), {"total": asked.energy(peer, one)}), tokens


def watched_seconds(peer: Peer, asked: Asked, prompts: Sequence[str]) -> Seen:
    """Time in the networks of each stage, the device synchronised around every call."""
    seen = Seen(dict.fromkeys(NETWORKS, 0.0), dict.fromkeys(NETWORKS, 0))
    clock = asked.clock_on(peer)

    def watch(stage: str, call: Call) -> Any:
        (seconds, _), out = both(clock, call)
        seen.seconds[stage] += seconds
        seen.calls[stage] += 1
        return out

    with peer.watching(watch):
        asked.call(peer, prompts)()
    return seen


def count_peer(peer: Peer, asked: Asked, prompts: Sequence[str]) -> tuple[dict[str, float], int | None]:
    """GMACs of a batch by stage, "total", and "forward": of a denoiser call with guidance 1; and the text's length."""
    macs = dict.fromkeys(NETWORKS, 0.0)
    lengths: list[int] = []

    def watch(stage: str, call: Call) -> Any:
        count, out = both(count_macs, call)
        macs[stage] += count / 1e9
        lengths.extend(_length(out) if stage == "text" else [])
        return out

    with peer.watching(watch):
        total = count_macs(asked.call(peer, prompts)) / 1e9
    forward = _forward_gmacs(peer, asked, prompts[:1])
    return {**macs, "total": total, "forward": forward}, max(lengths, default=None)


def memory_by_stage(peer: Peer, asked: Asked, prompts: Sequence[str]) -> dict[str, Memory]:
    """Each stage's first call, and the whole."""
    held = weights_of(peer.networks.values())
    found: dict[str, Memory] = {}

    def watch(stage: str, call: Call) -> Any:
        if stage in found:
            return call()
        found[stage], out = both(lambda c: peak_memory(c, peer.device, held), call)
        return out

    with peer.watching(watch):
        short(peer, asked).call(peer, prompts)()
    return {**found, "total": asked.memory(peer, prompts)}


def _forward_gmacs(peer: Peer, asked: Asked, prompts: Sequence[str]) -> float:
    """Of one denoiser call without guidance: the mean over two steps' calls."""
    counts: list[int] = []

    def watch(stage: str, call: Call) -> Any:
        if stage != "denoise":
            return call()
        count, out = both(count_macs, call)
        counts.append(count)
        return out

    with peer.watching(watch):
        short(peer, asked, guidance=1.0).call(peer, prompts)()
    return sum(counts) / len(counts) / 1e9 if counts else float("nan")


def short(peer: Peer, asked: Asked, **changes: Any) -> Asked:
    """The same in two steps, as far as the pipeline takes orders."""
    known = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
    orders = {"steps": 2, **changes}
    return asked._replace(**{name: value for name, value in orders.items() if known[name] in peer.accepts})


def _length(output: Any) -> list[int]:
    """How many tokens a text encoder's features have, where it gives them one by one."""
    features = getattr(output, "last_hidden_state", output[0] if isinstance(output, tuple) else None)
    return [features.shape[1]] if isinstance(features, Tensor) and features.ndim == 3 else []
