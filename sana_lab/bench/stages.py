"""Costs of a text2image system by stage (text, denoise, decode): time, MACs and memory, measured separately.

The input is random noise, and weights may be untrained: speed does not depend on either.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from sana_lab.bench.record import COMPONENTS, Latency, sum_of_first
from sana_lab.config.specs import build
from sana_lab.costs.flops import count_macs
from sana_lab.costs.live_memory import Memory, module_tensors, peak_memory
from sana_lab.costs.nvml import NvmlDevice
from sana_lab.costs.timing import Call, Energy, Samples, clock_for, collect_samples, energy_per_call
from sana_lab.diffusion import Process
from sana_lab.diffusion.guidance import reads_null, within
from sana_lab.diffusion.regional import Encoded
from sana_lab.diffusion.sampling import NoiseStreams, Sampling
from sana_lab.diffusion.solvers import at
from sana_lab.systems import best_of
from sana_lab.types import Text, Time, Velocity, as_time

Encodings = tuple[Text, Any, Encoded | None]
"""Features of the prompts, of the empty prompt (None if no guidance reads it), and of the regions' prompts."""

if TYPE_CHECKING:
    from sana_lab.systems.text2image import TextToImage


class StageCalls(NamedTuple):
    """Calls of the stages of sampling a batch of images."""

    text: Call  # prompts, and the empty prompt if guidance needs it -> features
    prepare: Callable[[], Velocity]  # features -> guided velocity, with captions and all times prepared
    step: Callable[[Time], Tensor]  # one evaluation of the velocity at t: one forward of 2 B rows with guidance
    eager_step: Callable[[Time], Tensor]  # `step` without CUDA graphs, for counters
    forward: Call  # one denoiser forward of B from text features, without guidance, as counted in papers
    denoise: Callable[[Sampling], Tensor]  # noise -> latents
    decode: Call  # latents -> images
    image: Call  # all three stages
    latents: tuple[int, ...]  # shape (B, C, h, w)
    text_tokens: int  # of the features, padding included
    prompt_tokens: int  # of the longest prompt, without padding
    first_text: Samples  # the first call of the text stage


class StageTimer(NamedTuple):
    """Times stages."""

    sampling: Sampling
    evaluations: dict[Time, int]  # from `evaluation_times`
    repeats: int
    measured_steps: int | None  # evaluations timed instead of all steps; None times all
    warmup: int
    device: torch.device

    def stages(self, calls: StageCalls) -> dict[str, Latency]:
        """Latency by stage, and "total": a separate run if all steps are timed, else the sum."""
        text = self.time(calls.text)._replace(first=calls.first_text.wall[0])
        stages = {"text": text, "denoise": self.denoise(calls), "decode": self.time(calls.decode)}
        total = self.time(calls.image) if self.measured_steps is None else Latency.plus(*stages.values())
        return {**stages, "total": total._replace(first=sum_of_first(stages.values()))}

    def total(self, calls: StageCalls) -> Latency:
        """Latency of the whole image."""
        return self.time(calls.image) if self.measured_steps is None else self.stages(calls)["total"]

    def denoise(self, calls: StageCalls) -> Latency:
        if self.measured_steps is None:
            return self.time(lambda: calls.denoise(self.sampling))
        parts = [self.time(calls.prepare)]
        for t, n in self.evaluations.items():
            step = collect_samples({"": partial(calls.step, t)}, self.warmup, self.measured_steps, self.device)[""]
            parts.append(Latency.of(step, n))
        return Latency.plus(*parts)

    def time(self, call: Call) -> Latency:
        return Latency.of(collect_samples({"": call}, self.warmup, self.repeats, self.device)[""])


def components(system: "TextToImage") -> dict[str, nn.Module]:
    return {name: getattr(system, name) for name in COMPONENTS.values()}


@contextmanager
def eval_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Set evaluation mode, and restore each module's own mode on exit."""
    modes = {m: m.training for module in modules for m in module.modules()}
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def stage_calls(system: "TextToImage", sampling: Sampling, size: int, batch: int, prompts: Sequence[str]) -> StageCalls:
    """All calls that are timed, on fixed random noise; prompts repeat to fill the batch."""
    parameter = next(system.dit.parameters())
    rows = batch * sampling.best_of  # candidates of an image are sampled together
    shape = (rows, *system.latent_shape(size))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(parameter)
    texts, half = list(islice(cycle(prompts), batch)), torch.full((batch,), 0.5).to(parameter)
    texts = best_of.repeated(texts, sampling.best_of)

    is_guided, fresh = reads_null(system.dit, sampling.guidance), NoiseStreams(shape[1:], 1, range(rows))

    def text() -> Encodings:
        system.text_encoder.clear_cache()
        caption = system.text_encoder(texts)
        null = system.text_encoder.negative([""], caption) if is_guided else None
        return caption, null, system.encoded_regions(texts, sampling, shape[2:])

    def prepare(encodings: Encodings, how: Sampling = sampling) -> Velocity:
        caption, null, regions = encodings
        return system.velocity(caption, null, how, regions=regions)

    def denoise(encodings: Encodings, how: Sampling) -> Tensor:
        return how.run(prepare(encodings, how), noise, system.flow, fresh)

    encoded: list[Encodings] = []
    first = collect_samples({"": lambda: encoded.append(text())}, 0, 1, system.device)[""]
    pair = encoded[0]
    velocity, eager = prepare(pair), prepare(pair, replace(sampling, graph="never"))
    return StageCalls(
        text=text,
        prepare=lambda: prepare(pair),
        step=lambda t: velocity(noise, at(t, noise)),
        eager_step=lambda t: eager(noise, at(t, noise)),
        forward=lambda: system.dit.without_guidance(noise[:batch], half, Text(*(x[:batch] for x in pair[0]))),
        denoise=lambda how: denoise(pair, how),
        decode=lambda: system.autoencoder.decode(noise),
        image=lambda: system.autoencoder.decode(denoise(text(), sampling)),
        latents=shape,
        text_tokens=pair[0].tokens.shape[1],
        prompt_tokens=int(pair[0].mask.sum(1).max()),
        first_text=first,
    )


def evaluation_times(sampling: Sampling, flow: Process) -> dict[Time, int]:
    """Representative times t of the solver's velocity evaluations, with the number of evaluations of equal cost.

    One time represents all; with a guidance interval, one inside and one outside; with regions, one while they are
    bound and one after that.
    """
    times = [*map(as_time, sampling.network_times(flow).tolist())]
    interval = None if sampling.guidance == 1 else sampling.guidance_interval
    bound = round(build("regions", sampling.regions).hard * len(times)) if sampling.regions is not None else 0
    groups: dict[tuple[bool, bool], list[Time]] = {}
    for i, t in enumerate(times):
        groups.setdefault((interval is None or within(interval, start_of(t)), i < bound), []).append(t)
    return {groups[key][0]: len(groups[key]) for key in sorted(groups, reverse=True)}


def start_of(time: Time) -> float:
    """A time, or the first of an interval."""
    return time[0] if isinstance(time, tuple) else time


def count_stages(calls: StageCalls, evaluations: dict[Time, int]) -> dict[str, float]:
    """GMACs of one image by stage and in "total", and of one denoiser "forward"."""
    text, decode, forward = (count_macs(call) for call in (calls.text, calls.decode, calls.forward))
    steps = sum(n * count_macs(partial(calls.eager_step, t)) for t, n in evaluations.items())
    denoise = count_macs(calls.prepare) + steps
    counts = {"text": text, "denoise": denoise, "decode": decode, "total": text + denoise + decode, "forward": forward}
    return {name: count / 1e9 for name, count in counts.items()}


def computed_share(dit: nn.Module, calls: StageCalls, sampling: Sampling) -> float:
    """Share of the blocks' rows that a denoising runs, of those that it would run without a step cache."""
    rows = {"blocks": 0, "embed": 0}

    def count(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: rows.update({name: rows[name] + len(output)})

    blocks: Any = dit.blocks
    hooks = [block.register_forward_hook(count("blocks")) for block in blocks]
    hooks.append(dit.get_submodule("patch_embed").register_forward_hook(count("embed")))
    try:
        calls.denoise(sampling)
    finally:
        for hook in hooks:
            hook.remove()
    return rows["blocks"] / (len(blocks) * rows["embed"])


def measure_memory(system: "TextToImage", calls: StageCalls, sampling: Sampling) -> dict[str, Memory]:
    """Peak memory by stage with the weights of all stages, and "total": the largest stage.

    Three steps suffice for the peak, because no solver keeps more velocities; with a guidance interval all steps run.
    """
    short = replace(sampling, steps=min(sampling.steps, 3)) if sampling.guidance_interval is None else sampling
    stages: dict[str, Call] = {"text": calls.text, "denoise": lambda: calls.denoise(short), "decode": calls.decode}
    weights = module_tensors(components(system).values())
    peaks = {name: peak_memory(call, system.device, weights) for name, call in stages.items()}
    return {**peaks, "total": max(peaks.values(), key=lambda memory: memory.peak_bytes)}


def measure_energy(
    calls: StageCalls, sampling: Sampling, gpu: NvmlDevice | None, seconds: float
) -> dict[str, Energy | None]:
    """Energy of a batch by stage and in "total", each repeated for at least `seconds`; None without a counter."""
    stages = {"text": calls.text, "denoise": lambda: calls.denoise(sampling), "decode": calls.decode}
    stages["total"] = calls.image
    if gpu is None or not seconds:
        return dict.fromkeys(stages)
    return {name: energy_per_call(call, gpu.joules, seconds, clock_for("cuda")) for name, call in stages.items()}
