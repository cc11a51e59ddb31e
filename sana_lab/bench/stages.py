"""What making a batch of images costs, stage by stage: text, denoise, decode; each timed, counted and weighed alone.

Speed does not depend on weights or pixels, so the input is random noise and the weights may be untrained.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sana_lab.bench.record import Seconds, total_first, weights_of
from sana_lab.costs.flops import count_macs
from sana_lab.costs.live_memory import Memory, peak_memory
from sana_lab.costs.nvml import Driver
from sana_lab.costs.timing import Call, Energy, Samples, clock_of, energy, sample
from sana_lab.diffusion import Process
from sana_lab.diffusion.guidance import within
from sana_lab.diffusion.sampling import Sampling
from sana_lab.diffusion.solvers import at
from sana_lab.systems.text2image import TextToImage
from sana_lab.types import Velocity

COMPONENT = {"text": "text_encoder", "denoise": "dit", "decode": "autoencoder"}


class Work(NamedTuple):
    """The calls that make a batch of images."""

    text: Call  # prompts, and the empty prompt where guidance needs it -> features
    prepare: Callable[[], Velocity]  # features -> the guided velocity: keys and values, and what times alone decide
    step: Callable[[float], Tensor]  # one evaluation of that at a time: one forward of 2 B where guided
    launched: Callable[[float], Tensor]  # the same, never replayed as a graph: a counter sees what it does
    forward: Call  # one forward of B from text features, without guidance: what papers count
    denoise: Callable[[Sampling], Tensor]  # noise -> latents
    decode: Call  # latents -> images
    image: Call  # all three stages
    latents: tuple[int, ...]  # (B, C, h, w)
    text_tokens: int  # of the features, padding included
    prompt_tokens: int  # of the longest prompt, without padding
    first_text: Samples  # the text stage's first call


class Timer(NamedTuple):
    """How the stages are timed."""

    sampling: Sampling
    evaluations: dict[float, int]  # as of `evaluation_times`
    repeats: int
    measured_steps: int | None
    warmup: int
    device: torch.device

    def stages(self, work: Work) -> dict[str, Seconds]:
        """Each stage alone, and the total: a run of its own where all steps are timed, else the sum."""
        text = self.time(work.text)._replace(first=work.first_text.wall[0])
        found = {"text": text, "denoise": self.denoise(work), "decode": self.time(work.decode)}
        whole = self.time(work.image) if self.measured_steps is None else Seconds.plus(*found.values())
        return {**found, "total": whole._replace(first=total_first(found.values()))}

    def total(self, work: Work) -> Seconds:
        """The whole image alone."""
        return self.time(work.image) if self.measured_steps is None else self.stages(work)["total"]

    def denoise(self, work: Work) -> Seconds:
        if self.measured_steps is None:
            return self.time(lambda: work.denoise(self.sampling))
        parts = [self.time(work.prepare)]
        for t, n in self.evaluations.items():
            step = sample({"": partial(work.step, t)}, self.warmup, self.measured_steps, self.device)[""]
            parts.append(Seconds.of(step, n))
        return Seconds.plus(*parts)

    def time(self, call: Call) -> Seconds:
        return Seconds.of(sample({"": call}, self.warmup, self.repeats, self.device)[""])


def components(system: TextToImage) -> dict[str, nn.Module]:
    return {name: getattr(system, name) for name in COMPONENT.values()}


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Evaluation mode, and afterwards each module's own again."""
    modes = {m: m.training for module in modules for m in module.modules()}
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def work(system: TextToImage, sampling: Sampling, size: int, batch: int, prompts: Sequence[str]) -> Work:
    """Everything that is timed, on fixed random noise."""
    parameter = next(system.dit.parameters())
    shape = (batch, *system.latent_shape(size))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(parameter)
    texts, half = list(islice(cycle(prompts), batch)), torch.full((batch,), 0.5).to(parameter)

    def text() -> tuple[Any, Any]:
        system.text_encoder.clear_cache()
        found = system.text_encoder(texts)
        return found, system.text_encoder.negative([""], found) if sampling.guidance != 1 else None

    def prepare(pair: tuple[Any, Any], how: Sampling = sampling) -> Velocity:
        return system.velocity(*pair, how)

    def denoise(pair: tuple[Any, Any], how: Sampling) -> Tensor:
        return how.run(prepare(pair, how), noise, system.flow)

    encoded: list[tuple[Any, Any]] = []
    first = sample({"": lambda: encoded.append(text())}, 0, 1, system.device)[""]
    pair = encoded[0]
    velocity, plain = prepare(pair), prepare(pair, replace(sampling, graph="never"))
    return Work(
        text=text,
        prepare=lambda: prepare(pair),
        step=lambda t: velocity(noise, at(t, noise)),
        launched=lambda t: plain(noise, at(t, noise)),
        forward=lambda: system.dit(noise, half, pair[0]),
        denoise=lambda how: denoise(pair, how),
        decode=lambda: system.autoencoder.decode(noise),
        image=lambda: system.autoencoder.decode(denoise(text(), sampling)),
        latents=shape,
        text_tokens=pair[0].tokens.shape[1],
        prompt_tokens=int(pair[0].mask.sum(1).max()),
        first_text=first,
    )


def evaluation_times(sampling: Sampling, flow: Process) -> dict[float, int]:
    """How often the solver asks for the velocity: by a time that stands for those that cost the same.

    One time stands for all, the first, but where guidance has an interval: one inside and one outside.
    """
    seen = sampling.network_times(flow).tolist()
    if sampling.guidance == 1 or sampling.guidance_interval is None:
        return {seen[0]: len(seen)}
    groups = [[t for t in seen if within(sampling.guidance_interval, t) is inside] for inside in (True, False)]
    return {group[0]: len(group) for group in groups if group}


def count_evaluations(sampling: Sampling, flow: Process) -> int:
    """How often the solver asks for the velocity."""
    return sum(evaluation_times(sampling, flow).values())


def count_stages(work: Work, evaluations: dict[float, int]) -> dict[str, float]:
    """GMACs of one image by stage, and "forward": of one denoiser forward."""
    text, decode, forward = (count_macs(call) for call in (work.text, work.decode, work.forward))
    steps = sum(n * count_macs(partial(work.launched, t)) for t, n in evaluations.items())
    denoise = count_macs(work.prepare) + steps
    counts = {"text": text, "denoise": denoise, "decode": decode, "total": text + denoise + decode, "forward": forward}
    return {name: count / 1e9 for name, count in counts.items()}


def measure_peaks(system: TextToImage, work: Work, sampling: Sampling) -> dict[str, Memory]:
    """By stage, all weights included; three steps stand for all, as no solver keeps more, if all cost the same."""
    short = replace(sampling, steps=min(sampling.steps, 3)) if sampling.guidance_interval is None else sampling
    calls: dict[str, Call] = {"text": work.text, "denoise": lambda: work.denoise(short), "decode": work.decode}
    held = weights_of(components(system).values())
    found = {name: peak_memory(call, system.device, held) for name, call in calls.items()}
    return {**found, "total": max(found.values(), key=lambda memory: memory.peak_bytes)}


def measure_energy(work: Work, sampling: Sampling, driver: Driver | None, seconds: float) -> dict[str, Energy | None]:
    """Of a batch by stage, each repeated for at least so many seconds."""
    calls = {"text": work.text, "denoise": lambda: work.denoise(sampling), "decode": work.decode, "total": work.image}
    if driver is None or not seconds:
        return dict.fromkeys(calls)
    return {name: energy(call, driver.joules, seconds, clock_of("cuda")) for name, call in calls.items()}
