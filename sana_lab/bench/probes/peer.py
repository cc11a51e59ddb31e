"""An image of another library's pipeline, at its published shape with random weights: what it costs."""

from collections.abc import Sequence
from typing import final

import torch

from sana_lab.bench.peer_stages import Asked, short
from sana_lab.bench.probes import PROMPT, Dtype, How, Probe
from sana_lab.bench.record import Seconds
from sana_lab.costs.timing import Samples, sample
from sana_lab.peers import random_init
from sana_lab.peers.pipeline import Peer

FEWEST = 2
"""Steps of the shorter run, where a step's time is that of a longer run less that of a shorter one."""


@final
class PeerImage(Probe):
    """`pipeline` of `systems.known_peers` at `size` pixels, with its card's `steps` and `guidance` unless they are
    given; throughput is at `batch`. `toy` is a small one of the same kind.

    With `measured_steps` an image's time is that of a run of 2 steps, and for each step more what a run of so many
    more has taken longer, per step; the two take turns.
    """

    inside = "the pipeline's call: tokenizing, text encoders, all steps with guidance, decoding, 8-bit images"

    def __init__(
        self,
        pipeline: str = "flux_dev",
        size: int = 1024,
        steps: int | None = None,
        guidance: float | None = None,
        batch: int = 1,
        dtype: Dtype = "float32",
        measured_steps: int | None = None,
        toy: bool = False,
    ) -> None:
        spec = random_init.config_of(pipeline)
        self.pipeline, self.size, self.batch, self.dtype, self.toy = pipeline, size, batch, dtype, toy
        self.steps: int = spec["steps"] if steps is None else steps
        self.guidance: float = spec["guidance"] if guidance is None else guidance
        self.measured_steps = measured_steps

    def count(self) -> dict[str, float]:
        peer, counts = random_init.count(self.pipeline, PROMPT, self.size, self.steps, self.guidance, self.toy)
        params = random_init.count_parameters(peer)
        return {
            "params_b": params["all"] / 1e9,
            "dit_params_b": params["denoiser"] / 1e9,
            "dit_params_m": params["denoiser"] / 1e6,
            "tokens": counts.tokens,
            "text_tokens": counts.text_tokens,
            "steps": self.steps,
            "evaluations": counts.evaluations,
            "tmacs": counts.forward / 1e12,
            "tmacs_image": sum(counts.macs.values()) / 1e12,
        }

    def measure(self, how: How) -> dict[str, float]:
        peer = random_init.build(self.pipeline, self.size, how.device, getattr(torch, self.dtype), self.toy)
        asked = Asked(self.size, self.steps, self.guidance, how.repeats, how.warmup)
        one = self.seconds(peer, asked, [PROMPT])
        many = one if self.batch == 1 else self.seconds(peer, asked, [PROMPT] * self.batch)
        return {
            "latency_s": one.median,
            "latency_s_low": one.low,
            "latency_s_high": one.high,
            "images_per_s": self.batch / many.median,
            "images_per_s_low": self.batch / many.high,
            "images_per_s_high": self.batch / many.low,
            "peak_gib": short(peer, asked).memory(peer, [PROMPT] * self.batch).peak_mib / 1024,
        }

    def seconds(self, peer: Peer, asked: Asked, prompts: Sequence[str]) -> Seconds:
        """Of a batch: all steps, or as many as say what a step takes."""
        if self.measured_steps is None or self.steps <= FEWEST + self.measured_steps:
            runs = {"": asked.call(peer, prompts)}
            return Seconds.of(sample(runs, asked.warmup, asked.repeats, peer.device, asked.clock)[""])
        steps = {name: FEWEST + more for name, more in (("few", 0), ("more", self.measured_steps))}
        runs = {name: asked._replace(steps=n).call(peer, prompts) for name, n in steps.items()}
        found = sample(runs, asked.warmup, asked.repeats, peer.device, asked.clock)
        pairs = zip(found["few"].wall, found["more"].wall, strict=True)
        return Seconds.of(Samples(tuple(extended(few, more, self.measured_steps, self.steps) for few, more in pairs)))


def extended(few: float, more: float, apart: int, steps: int) -> float:
    """Seconds of a run of `steps`, from one of 2 steps and one of `apart` more."""
    return few + (steps - FEWEST) * (more - few) / apart
