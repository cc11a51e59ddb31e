"""Probe of a diffusers pipeline: the cost of an image at its published size, with random weights."""

from collections.abc import Sequence
from typing import final

import torch

from sana_lab.bench.peer_stages import PeerSettings, two_steps
from sana_lab.bench.probes import PROMPT, Dtype, Probe, ProbeSettings
from sana_lab.bench.record import Latency
from sana_lab.config.ranges import BatchSize, Evaluations, Pixels, Real
from sana_lab.costs.timing import Samples, collect_samples
from sana_lab.peers import random_init
from sana_lab.peers.pipeline import Peer

SHORT_STEPS = 2
"""Steps of the shorter of two runs, whose difference gives the time per step."""


@final
class PeerImage(Probe):
    """An image of a published pipeline from `sana_lab.peers.configs`.

    With `measured_steps` = m, runs of 2 and of 2 + m steps are timed in turns. The time of an image is that of the
    short run plus, for each further step, the difference between the runs divided by m.
    """

    inside = "the pipeline's call: tokenizing, text encoders, all steps with guidance, decoding, 8-bit images"

    def __init__(
        self,
        pipeline: str = "flux_dev",  # name in `sana_lab.peers.configs`, such as sd3_medium
        size: Pixels = 1024,  # pixels a side
        steps: Evaluations | None = None,  # solver steps; None is the model card's value
        guidance: Real | None = None,  # guidance scale; None is the model card's value
        batch: BatchSize = 1,  # images of the throughput and memory measurement; latency is at 1
        dtype: Dtype = "float32",  # of weights and activations
        # extrapolate the time from runs of 2 and of 2 + measured_steps steps; None times all steps
        measured_steps: Evaluations | None = None,
        toy: bool = False,  # small networks of the same classes, for tests
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

    def measure(self, settings: ProbeSettings) -> dict[str, float]:
        peer = random_init.build(self.pipeline, self.size, settings.device, getattr(torch, self.dtype), self.toy)
        options = PeerSettings(self.size, self.steps, self.guidance, settings.repeats, settings.warmup)
        one = self.latency(peer, options, [PROMPT])
        many = one if self.batch == 1 else self.latency(peer, options, [PROMPT] * self.batch)
        return {
            "latency_s": one.median,
            "latency_s_low": one.low,
            "latency_s_high": one.high,
            "images_per_s": self.batch / many.median,
            "images_per_s_low": self.batch / many.high,
            "images_per_s_high": self.batch / many.low,
            "peak_gib": two_steps(peer, options).memory(peer, [PROMPT] * self.batch).peak_mib / 1024,
        }

    def latency(self, peer: Peer, settings: PeerSettings, prompts: Sequence[str]) -> Latency:
        """Latency of a batch, with all steps timed or extrapolated."""
        if self.measured_steps is None or self.steps <= SHORT_STEPS + self.measured_steps:
            samples = self._samples(peer, settings, {"": self.steps}, prompts)
            return Latency.of(samples[""])
        steps = {"short": SHORT_STEPS, "long": SHORT_STEPS + self.measured_steps}
        samples = self._samples(peer, settings, steps, prompts)
        pairs = zip(samples["short"].wall, samples["long"].wall, strict=True)
        return Latency.of(Samples(tuple(extrapolate(*pair, self.measured_steps, self.steps) for pair in pairs)))

    @staticmethod
    def _samples(
        peer: Peer, settings: PeerSettings, steps: dict[str, int], prompts: Sequence[str]
    ) -> dict[str, Samples]:
        calls = {name: settings._replace(steps=n).call(peer, prompts) for name, n in steps.items()}
        return collect_samples(calls, settings.warmup, settings.repeats, peer.device, settings.clock)


def extrapolate(short: float, long: float, difference: int, steps: int) -> float:
    """Seconds of a run of `steps`, from a run of SHORT_STEPS and one of `difference` more steps."""
    return short + (steps - SHORT_STEPS) * (long - short) / difference
