"""What an image costs: parameters, MACs, latency, throughput and peak memory, by stage.

Speed does not depend on weights or pixels, so the input is random noise and the weights may be untrained.
"""

import json
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from sana_lab import config
from sana_lab.diffusion.ddpm import Ddpm
from sana_lab.diffusion.flow import Flow
from sana_lab.diffusion.guidance import guided, within
from sana_lab.diffusion.sampling import Sampling
from sana_lab.evaluation.efficiency import Call, Timing, measure, peak_memory
from sana_lab.evaluation.flops import DEFINITION, PAIR, by_component, count_macs, count_pair_macs
from sana_lab.parts import Spec, SpecError, build
from sana_lab.systems.text2image import TextToImage
from sana_lab.types import Json, Velocity

PROMPTS = ("a photo of a red circle left of a blue square", "a photo of three green triangles")
COMPONENT = {"text": "text_encoder", "denoise": "dit", "decode": "autoencoder"}
STAGES = tuple(COMPONENT)


class Seconds(NamedTuple):
    """A latency with the bounds of its 95 % interval; sums of medians carry the sums of bounds, which is cautious."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, timing: Timing, times: int = 1) -> "Seconds":
        return cls(timing.median_s * times, timing.low_s * times, timing.high_s * times)

    def plus(self, *others: "Seconds") -> "Seconds":
        return Seconds(*(sum(values) for values in zip(self, *others, strict=True)))


class Work(NamedTuple):
    """The calls that make a batch of images."""

    text: Call  # prompts, and the empty prompt where guidance needs it -> features
    prepare: Callable[[], Velocity]  # features -> the guided velocity: caption projection, keys and values
    step: Callable[[float], Tensor]  # one evaluation of that at a time: one forward of 2 B where guided
    forward: Call  # one forward of B from text features, without guidance: what papers count
    denoise: Callable[[Sampling], Tensor]  # noise -> latents
    decode: Call  # latents -> images
    image: Call  # all three stages
    latents: tuple[int, ...]  # (B, C, h, w)
    text_tokens: int


@torch.no_grad()
def bench(
    system: TextToImage,
    sampling: Sampling,
    size: int,
    batch: int = 1,
    prompts: Sequence[str] = PROMPTS,
    repeats: int = 5,
    measured_steps: int | None = None,
    warmup: int = 1,
) -> Json:
    """The cost of images of `size` pixels a side, as plain data; `notes` defines every number.

    Latency is at batch 1, throughput and peak memory at `batch`. With `measured_steps` the denoiser's time is that of
    one evaluation, the median of so many, times the number of evaluations. ValueError for a size that does not divide.
    """
    _check(batch, prompts)
    with evaluating(components(system).values()):
        one, many = (work(system, sampling, size, b, prompts) for b in (1, batch))
        evaluations = evaluation_times(sampling, system.flow)
        timer = Timer(sampling, evaluations, repeats, measured_steps, warmup, system.device)
        seconds = timer.stages(one)
        total = seconds["total"].median if batch == 1 else timer.stages(many)["total"].median
        macs = count_stages(one, evaluations)
        peaks = measure_peaks(system, many, sampling)
    return {
        "size": size,
        "batch": batch,
        "tokens": one.latents[2] * one.latents[3] // system.dit.patch**2,
        "text_tokens": one.text_tokens,
        "latent": list(one.latents[1:]),
        **_headline(system, seconds, batch / total, macs, peaks),
        "tmacs_pair": pair_tmacs(cast("Spec", system.dit.spec), one.latents[1:], system.text_encoder.dim),
        "stages": _stages(system, seconds, macs, peaks),
        "settings": _settings(system, sampling, timer),
        "notes": notes(sampling, sum(evaluations.values()), batch, measured_steps, peaks["method"]),
    }


def main(experiment: Json, *, size: int | None, batch: int, repeats: int, json_file: Path | None) -> None:
    """`sana-lab bench`: measure a resolved experiment's system, untrained; a table, and JSON where asked."""
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise ValueError(f"cannot write {json_file}: there is no folder {json_file.absolute().parent}")
    record = bench_experiment(experiment, size=size, batch=batch, repeats=repeats)
    print(table(record))
    if json_file is not None:
        json_file.write_text(json.dumps(record, indent=2) + "\n")


def bench_experiment(
    experiment: Json, *, size: int | None = None, batch: int | None = None, repeats: int | None = None
) -> Json:
    """`bench` of a resolved experiment with its `eval.bench_*` options, or with those given."""
    options = experiment["eval"]
    return bench(
        build_untrained(experiment),
        Sampling(**experiment["sampling"]),
        size or options["bench_size"] or config.image_size(experiment["data"]),
        options["bench_batch"] if batch is None else batch,
        repeats=options["bench_repeats"] if repeats is None else repeats,
        measured_steps=options["bench_steps"],
    )


def table(record: Json) -> str:
    """The record for a reader: one line a stage, then the definitions."""
    head = f"{'stage':<9}{'params M':>10}{'GMACs':>12}{'latency s':>12}{'95 % interval':>19}{'peak MiB':>11}"
    lines = [_line(name, stage) for name, stage in record["stages"].items()]
    size, (c, h, w) = record["size"], record["latent"]
    title = f"{size}x{size} pixels, latents {c}x{h}x{w}, {record['tokens']} tokens, {record['text_tokens']} of text"
    speed = f"{record['images_per_s']:.4g} images/s at batch {record['batch']}; {record['settings']['device']}"
    return "\n".join([title, head, *lines, speed, *(f"- {note}" for note in record["notes"])])


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
        found = system.text_encoder(texts)
        return found, system.text_encoder.against([""], found) if sampling.guidance != 1 else None

    def prepare(pair: tuple[Any, Any]) -> Velocity:
        return guided(system.dit, *pair, sampling.guidance, sampling.guidance_interval)

    def denoise(pair: tuple[Any, Any], how: Sampling) -> Tensor:
        return how.run(prepare(pair), noise, system.flow)

    pair = text()
    velocity = prepare(pair)
    return Work(
        text=text,
        prepare=lambda: prepare(pair),
        step=lambda t: velocity(noise, torch.full_like(half, t)),
        forward=lambda: system.dit(noise, half, pair[0]),
        denoise=lambda how: denoise(pair, how),
        decode=lambda: system.autoencoder.decode(noise),
        image=lambda: system.autoencoder.decode(denoise(text(), sampling)),
        latents=shape,
        text_tokens=pair[0].tokens.shape[1],
    )


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
        found = {"text": self.time(work.text), "denoise": self.denoise(work), "decode": self.time(work.decode)}
        whole = self.time(work.image) if self.measured_steps is None else Seconds.plus(*found.values())
        return {**found, "total": whole}

    def denoise(self, work: Work) -> Seconds:
        if self.measured_steps is None:
            return self.time(lambda: work.denoise(self.sampling))
        parts = [self.time(work.prepare)]
        for t, n in self.evaluations.items():
            step = measure(partial(work.step, t), self.warmup, self.measured_steps, self.device)
            parts.append(Seconds.of(step, n))
        return Seconds.plus(*parts)

    def time(self, call: Call) -> Seconds:
        return Seconds.of(measure(call, self.warmup, self.repeats, self.device))


def evaluation_times(sampling: Sampling, flow: Flow | Ddpm) -> dict[float, int]:
    """How often the solver asks for the velocity: by a time that stands for those that cost the same.

    One time stands for all, but where guidance has an interval: one inside and one outside.
    """
    seen: list[float] = []

    def still(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t[0].item())
        return torch.zeros_like(x)

    sampling.run(still, torch.zeros(1, 1, 1, 1), flow)
    if sampling.guidance == 1 or sampling.guidance_interval is None:
        return {0.5: len(seen)}
    groups = [[t for t in seen if within(sampling.guidance_interval, t) is inside] for inside in (True, False)]
    return {group[0]: len(group) for group in groups if group}


def count_evaluations(sampling: Sampling, flow: Flow | Ddpm) -> int:
    """How often the solver asks for the velocity."""
    return sum(evaluation_times(sampling, flow).values())


def count_stages(work: Work, evaluations: dict[float, int]) -> dict[str, float]:
    """GMACs of one image by stage, and "forward": of one denoiser forward."""
    text, decode, forward = (count_macs(call) for call in (work.text, work.decode, work.forward))
    steps = sum(n * count_macs(partial(work.step, t)) for t, n in evaluations.items())
    denoise = count_macs(work.prepare) + steps
    counts = {"text": text, "denoise": denoise, "decode": decode, "total": text + denoise + decode, "forward": forward}
    return {name: count / 1e9 for name, count in counts.items()}


def pair_tmacs(dit: Spec, latent: Sequence[int], text_dim: int) -> float:
    """10^12 MACs of a denoiser on latents (C, h, w) as the SANA paper counts them (`flops.PAIR`); needs no weights."""
    with torch.device("meta"):
        bare = build("dit", dit, channels=latent[0], text_dim=text_dim)
    return count_pair_macs(bare, latent, text_dim) / 1e12


def measure_peaks(system: TextToImage, work: Work, sampling: Sampling) -> Json:
    """MiB by stage, all weights included; three steps stand for all, as no solver keeps more, if all cost the same."""
    short = replace(sampling, steps=min(sampling.steps, 3)) if sampling.guidance_interval is None else sampling
    calls = {"text": work.text, "denoise": lambda: work.denoise(short), "decode": work.decode}
    weights = [t for m in components(system).values() for t in (*m.parameters(), *m.buffers())]
    found = {name: peak_memory(call, system.device, weights) for name, call in calls.items()}
    peaks = {name: memory.peak_mib for name, memory in found.items()}
    resident = sum(t.numel() * t.element_size() for t in {id(t): t for t in weights}.values()) / 2**20
    return {**peaks, "total": max(peaks.values()), "weights": resident, "method": found["text"].method}


def notes(sampling: Sampling, evaluations: int, batch: int, measured_steps: int | None, memory: str) -> list[str]:
    """The definitions of a record's numbers."""
    is_guided = sampling.guidance != 1
    solver = sampling.solver if isinstance(sampling.solver, str) else sampling.solver["name"]
    how = "all timed" if measured_steps is None else f"median of {measured_steps} evaluations times {evaluations}"
    rows = "one batched forward of 2 B each" if is_guided else "without guidance"
    if is_guided and sampling.guidance_interval is not None:
        rows = "one batched forward of 2 B each from t {} to {}, of B elsewhere".format(*sampling.guidance_interval)
    whole = "a run of its own" if measured_steps is None else "the sum of the stages"
    return [
        f"gmacs: one denoiser forward at batch 1 without guidance, caption projection included; {DEFINITION}",
        f"tmacs_pair: {PAIR}",
        f"gmacs by stage: one image: text{' and null text' if is_guided else ''}, {evaluations} evaluations, decode",
        f"denoise: {sampling.steps} {solver} steps, {evaluations} evaluations, {rows}; {how}; captions prepared once",
        f"latency: median at batch 1 after warm-up, with its 95 % interval; total: {whole}; decode gives floats",
        f"images_per_s: {batch} / latency of a batch of {batch}",
        f"peak_mib: at batch {batch}, weights of all stages included; {memory}; total: the largest stage",
        "params_m: all three networks, each number once, averaged copies left out",
    ]


def build_untrained(experiment: Json) -> TextToImage:
    """A resolved experiment's system without its weights, on the fastest device; on CUDA in half if so trained."""
    spec = experiment["system"]
    if not all(isinstance(spec.get(name), dict) for name in COMPONENT.values()):
        raise SpecError(f"bench measures a text2image system, but this experiment trains {spec['name']!r}")
    bare = {
        k: {o: v for o, v in s.items() if o != "weights"} if k in COMPONENT.values() else s for k, s in spec.items()
    }
    cuda = torch.cuda.is_available()
    half = {"bf16": torch.bfloat16, "16-": torch.float16}
    precision = experiment["trainer"]["precision"]
    dtype = next((d for p, d in half.items() if cuda and precision.startswith(p)), torch.float32)
    return build("system", bare).to("cuda" if cuda else "cpu", dtype)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.get_num_threads()} threads"


def processor() -> str:
    """The CPU's name as Linux gives it, or the architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _check(batch: int, prompts: Sequence[str]) -> None:
    if batch < 1:
        raise ValueError(f"bench batch is {batch}, expected at least 1")
    if not prompts or isinstance(prompts, str):
        raise ValueError(f"bench prompts are {prompts!r}, expected a list of at least one text")


def _headline(
    system: TextToImage, seconds: dict[str, Seconds], speed: float, macs: dict[str, float], peaks: Json
) -> Json:
    """The columns of a table."""
    return {
        "params_m": by_component(components(system))["all"]["total"] / 1e6,
        "gmacs": macs["forward"],
        "gmacs_image": macs["total"],
        "latency_s": seconds["total"].median,
        "images_per_s": speed,
        "peak_mib": peaks["total"],
        "weights_mib": peaks["weights"],
    }


def _stages(system: TextToImage, seconds: dict[str, Seconds], macs: dict[str, float], peaks: Json) -> Json:
    params = by_component(components(system))
    return {
        name: {
            "params_m": params[COMPONENT.get(name, "all")]["total"] / 1e6,
            "trainable_m": params[COMPONENT.get(name, "all")]["trainable"] / 1e6,
            "gmacs": macs[name],
            "latency_s": seconds[name].median,
            "low_s": seconds[name].low,
            "high_s": seconds[name].high,
            "peak_mib": peaks[name],
        }
        for name in (*STAGES, "total")
    }


def _settings(system: TextToImage, sampling: Sampling, timer: Timer) -> Json:
    return {
        "device": device_name(timer.device),
        "dtype": {k: str(next(m.parameters()).dtype).removeprefix("torch.") for k, m in components(system).items()},
        "torch": torch.__version__,
        "sampling": asdict(sampling),
        "evaluations": sum(timer.evaluations.values()),
        "warmup": timer.warmup,
        "repeats": timer.repeats,
        "measured_steps": timer.measured_steps,
    }


def _line(name: str, stage: Json) -> str:
    interval = f"{stage['low_s']:.3g} to {stage['high_s']:.3g}"
    numbers = f"{stage['gmacs']:>12.4g}{stage['latency_s']:>12.4g}{interval:>19}{stage['peak_mib']:>11.1f}"
    return f"{name:<9}{stage['params_m']:>10.3f}{numbers}"
