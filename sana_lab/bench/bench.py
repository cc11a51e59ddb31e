"""What an image costs: parameters, MACs, latency, throughput, peak memory and energy, by stage; ours and a peer's.

Speed does not depend on weights or pixels, so the input is random noise and the weights may be untrained.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import cast

import torch
from torch import nn

from sana_lab.bench.memory_advice import advised, untrained
from sana_lab.bench.peer_stages import Asked, measure_peer, time_peer
from sana_lab.bench.record import Costs, by_stage, device_name, headline, machine, table
from sana_lab.bench.stages import (
    COMPONENT,
    Timer,
    components,
    count_stages,
    evaluating,
    evaluation_times,
    measure_energy,
    measure_peaks,
    work,
)
from sana_lab.checkpoints.build import build
from sana_lab.config import experiments
from sana_lab.config.paths import check_file
from sana_lab.config.specs import Spec, SpecError
from sana_lab.costs import nvml as drivers
from sana_lab.costs.batch_sweep import Rung, host_room, sweep
from sana_lab.costs.flops import DEFINITION, PAIR, count_pair_macs
from sana_lab.costs.nvml import Driver
from sana_lab.costs.timing import clock_of, energy, enough_for
from sana_lab.diffusion.sampling import Sampling
from sana_lab.peers.pipeline import Peer
from sana_lab.systems.quantize import quantize
from sana_lab.systems.text2image import TextToImage
from sana_lab.types import Json

__all__ = [
    "bench",
    "bench_experiment",
    "bench_peer",
    "build_untrained",
    "device_name",
    "draw_untrained",
    "main",
    "main_peer",
    "table",
    "without_weights",
]

PROMPTS = ("a photo of a red circle left of a blue square", "a photo of three green triangles")
ENERGY_S = 2.0
"""How long `sana-lab bench` repeats a stage for its energy; the drivers' counters move some ten times a second."""


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
    most: int | None = None,
    energy_s: float = 0.0,
) -> Json:
    """The cost of images of `size` pixels a side, as plain data; `notes` defines every number.

    Latency is at batch 1, throughput and peak memory at `batch`. With `measured_steps` the denoiser's time is that of
    one evaluation, the median of so many, times the number of evaluations. `most` adds a sweep of batches up to it, or
    until memory is full; `energy_s` measures energy, each stage repeated for so long, where the driver counts it. Where
    `sampling` quantises, the denoiser stays so. ValueError for a size that does not divide.
    """
    _check(batch, prompts)
    driver, why = drivers.find(system.device)
    with evaluating(components(system).values()):
        evaluations = evaluation_times(sampling, system.flow)
        counted = _in_full(system, sampling, size, prompts, evaluations)
        quantize(system.dit, sampling.quantize)
        one = work(system, sampling, size, 1, prompts)
        timer = Timer(sampling, evaluations, repeats, measured_steps, warmup, system.device)
        seconds = timer.stages(one)
        many = one if batch == 1 else work(system, sampling, size, batch, prompts)
        total = seconds["total"] if batch == 1 else timer.total(many)
        costs = Costs(
            seconds,
            counted or count_stages(one, evaluations),
            measure_peaks(system, many, sampling),
            measure_energy(one, sampling, driver, energy_s),
        )
        del many
        rung = partial(_rung, system, sampling, size, prompts, timer, driver, energy_s)
        swept = {} if most is None else {"sweep": sweep(rung, most, _room(system.device))}
    return {
        "size": size,
        "batch": batch,
        "tokens": one.latents[2] * one.latents[3] // system.dit.patch**2,
        "text_tokens": one.text_tokens,
        "prompt_tokens": one.prompt_tokens,
        "latent": list(one.latents[1:]),
        **headline(components(system), costs, batch / total.median),
        "images_per_s_low": batch / total.high,
        "images_per_s_high": batch / total.low,
        "tmacs_pair": pair_tmacs(cast("Spec", system.dit.spec), one.latents[1:], system.text_encoder.dim),
        "stages": by_stage(components(system), COMPONENT, costs),
        **swept,
        "settings": _settings(system, sampling, timer, driver, why),
        "notes": notes(sampling, sum(evaluations.values()), batch, measured_steps, costs.memory["total"].method)
        + _more_notes(repeats, why if energy_s else "not asked for", "sweep" in swept),
    }


@torch.no_grad()
def bench_peer(
    peer: Peer,
    size: int,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    batch: int = 1,
    prompts: Sequence[str] = PROMPTS,
    repeats: int = 5,
    warmup: int = 1,
    most: int | None = None,
    energy_s: float = 0.0,
) -> Json:
    """The same of a diffusers pipeline, in the same columns; `steps` and `guidance` None are its own."""
    _check(batch, prompts)
    driver, why = drivers.find(peer.device)
    asked = Asked(size, steps, guidance, repeats, warmup, driver, energy_s)
    texts = partial(_repeated, prompts)
    with evaluating(peer.networks.values()):
        costs, tokens = measure_peer(peer, asked, texts(1), texts(batch))
        total = costs.seconds["total"] if batch == 1 else time_peer(peer, asked, texts(batch))
        rung = partial(_peer_rung, peer, asked, prompts)
        swept = {} if most is None else {"sweep": sweep(rung, most, _room(peer.device))}
    stages = cast("dict[str, nn.Module]", peer.stages())
    return {
        "size": size,
        "batch": batch,
        "text_tokens": tokens,
        **({"latent": list(peer.latent_shape(size))} if peer.noise == "latents" else {}),
        **headline(peer.networks, costs, batch / total.median),
        "stages": by_stage(stages, {name: name for name in stages}, costs, nn.ModuleDict(peer.networks)),
        **swept,
        "settings": {
            **machine(peer.device, driver, peer.networks),
            "peer": peer.identity(),
            "sampling": {"steps": steps, "guidance": guidance},
            "warmup": warmup,
            "repeats": repeats,
        },
        "notes": _peer_notes(batch, costs.memory["total"].method)
        + _more_notes(repeats, why if energy_s else "not asked for", "sweep" in swept),
    }


def main(
    experiment: Json, *, size: int | None, batch: int, repeats: int, json_file: Path | None, most: int | None = None
) -> None:
    """`sana-lab bench`: measure a resolved experiment's system, untrained; a table, and JSON where asked."""
    check_file(json_file)
    size = size or experiment["eval"]["bench_size"] or experiments.image_size(experiment["data"])
    how: Json = {"size": size, "batch": batch, "repeats": repeats, "most": most, "energy_s": ENERGY_S}
    with advised(lambda: untrained(experiment, size, batch, "--batch").tips()):
        record = bench_experiment(experiment, **how)
    _tell(record, json_file)


def main_peer(
    reference: str,
    *,
    size: int,
    batch: int,
    repeats: int,
    json_file: Path | None,
    most: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    half: bool = True,
) -> None:
    """`sana-lab bench` of a diffusers pipeline's folder or hub id; on CUDA in bfloat16 unless `half` is false."""
    check_file(json_file)
    cuda = torch.cuda.is_available()
    peer = Peer.load(reference, dtype=torch.bfloat16 if cuda and half else torch.float32)
    how: Json = {"steps": steps, "guidance": guidance, "repeats": repeats, "most": most, "energy_s": ENERGY_S}
    _tell(bench_peer(peer, size, batch=batch, **how), json_file)


def bench_experiment(
    experiment: Json,
    *,
    size: int | None = None,
    batch: int | None = None,
    repeats: int | None = None,
    most: int | None = None,
    energy_s: float = 0.0,
) -> Json:
    """`bench` of a resolved experiment with its `eval.bench_*` options, or with those given."""
    options = experiment["eval"]
    return bench(
        build_untrained(experiment),
        Sampling(**experiment["sampling"]),
        size or options["bench_size"] or experiments.image_size(experiment["data"]),
        options["bench_batch"] if batch is None else batch,
        repeats=options["bench_repeats"] if repeats is None else repeats,
        measured_steps=options["bench_steps"],
        most=most,
        energy_s=energy_s,
    )


def pair_tmacs(dit: Spec, latent: Sequence[int], text_dim: int) -> float:
    """10^12 MACs of a denoiser on latents (C, h, w) as the SANA paper counts them (`flops.PAIR`); needs no weights."""
    with torch.device("meta"):
        bare = build("dit", dit, channels=latent[0], text_dim=text_dim)
    return count_pair_macs(bare, latent, text_dim) / 1e12


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
        f"denoise: {sampling.steps} {solver} steps, {evaluations} evaluations, {rows}; {how}; captions prepared once, "
        "and what depends on times alone for all of them at once",
        "text: each prompt as if new; a frozen decoder with `cache` has read instruction and empty prompt before",
        f"latency: median at batch 1 after warm-up, with its 95 % interval; total: {whole}; decode gives floats",
        "first_s: the first call, with compilation and tuning; of the denoiser one evaluation where not all are timed",
        f"images_per_s: {batch} / latency of a batch of {batch}",
        f"peak_mib: at batch {batch}, weights of all stages included; {memory}; total: the largest stage",
        "params_m: all three networks, each number once, averaged copies left out",
    ]


def build_untrained(experiment: Json) -> TextToImage:
    """A resolved experiment's system without its weights, on the fastest device; on CUDA in half if so trained."""
    spec = experiment["system"]
    if not all(isinstance(spec.get(name), dict) for name in COMPONENT.values()):
        raise SpecError(f"bench measures a text2image system, but this experiment trains {spec['name']!r}")
    cuda = torch.cuda.is_available()
    half = {"bf16": torch.bfloat16, "16-": torch.float16}
    precision = experiment["trainer"]["precision"]
    dtype = next((d for p, d in half.items() if cuda and precision.startswith(p)), torch.float32)
    return draw_untrained(spec, torch.device("cuda" if cuda else "cpu"), dtype)


def draw_untrained(spec: Json, device: torch.device, dtype: torch.dtype) -> TextToImage:
    """The system of a resolved spec without its weights, made on the device where it is to run."""
    with device:
        return build("system", without_weights(spec)).to(device, dtype)


def without_weights(spec: Json) -> Json:
    """A system's spec, its parts as they are made and not as they were trained."""
    parts = COMPONENT.values()
    return {k: {o: v for o, v in s.items() if o != "weights"} if k in parts else s for k, s in spec.items()}


def _in_full(
    system: TextToImage, sampling: Sampling, size: int, prompts: Sequence[str], evaluations: dict[float, int]
) -> dict[str, float] | None:
    """The counts of a denoiser that is about to be quantised: products of eight bits are not counted."""
    quantised = sampling.quantize != system.dit.quantized
    return count_stages(work(system, sampling, size, 1, prompts), evaluations) if quantised else None


def _more_notes(repeats: int, energy: str, swept: bool) -> list[str]:
    needed = ", ".join(f"p{q} {enough_for(q / 100)}" for q in (50, 90, 99))
    few = f"too few for {_unbounded(repeats)}" if repeats < enough_for(0.99) else "enough for all"
    how = "of one image, the whole device's by the driver's counter" if not energy else f"not measured: {energy}"
    return [
        f"p50, p90, p99: intervals by order statistics; both bounds need calls: {needed}; here {repeats}, {few}",
        f"energy_j: {how}",
        *(["sweep: whole images, doubling the batch; its interval is that of the median"] if swept else []),
    ]


def _unbounded(repeats: int) -> str:
    return ", ".join(f"p{q}" for q in (50, 90, 99) if repeats < enough_for(q / 100))


def _peer_notes(batch: int, memory: str) -> list[str]:
    return [
        f"gmacs: one call of the denoiser at batch 1 with guidance 1; {DEFINITION}",
        "gmacs by stage: one image, in the calls that the pipeline makes",
        "latency: of the whole pipeline at batch 1, to 8-bit images; stages: the networks alone in runs of their own, "
        "the device synchronised around every call; the rest of the total is tokenizing, scheduling and the host",
        "first_s: the first call, with compilation and tuning",
        f"images_per_s: {batch} / latency of a batch of {batch}",
        f"peak_mib: at batch {batch}, weights of all components included; {memory}; of a stage: its first call",
        "params_m: all components with weights, each number once",
    ]


def _rung(
    system: TextToImage,
    sampling: Sampling,
    size: int,
    prompts: Sequence[str],
    timer: Timer,
    driver: Driver | None,
    energy_s: float,
    batch: int,
) -> Rung:
    """A batch of whole images."""
    many = work(system, sampling, size, batch, prompts)
    memory = measure_peaks(system, many, sampling)["total"]
    seconds = timer.total(many)
    used = energy(many.image, driver.joules, energy_s, clock_of(system.device)) if driver and energy_s else None
    return Rung(batch, seconds[:3], memory, used)


def _peer_rung(peer: Peer, asked: Asked, prompts: Sequence[str], batch: int) -> Rung:
    texts = _repeated(prompts, batch)
    memory = asked.memory(peer, texts)
    return Rung(batch, time_peer(peer, asked, texts)[:3], memory, asked.energy(peer, texts))


def _room(device: torch.device) -> Callable[[Rung], str | None]:
    """On the host memory is looked at before a batch; a GPU raises by itself."""
    return host_room if device.type == "cpu" else lambda rung: None


def _repeated(prompts: Sequence[str], count: int) -> list[str]:
    return list(islice(cycle(prompts), count))


def _check(batch: int, prompts: Sequence[str]) -> None:
    if batch < 1:
        raise ValueError(f"bench batch is {batch}, expected at least 1")
    if not prompts or isinstance(prompts, str):
        raise ValueError(f"bench prompts are {prompts!r}, expected a list of at least one text")


def _tell(record: Json, json_file: Path | None) -> None:
    print(table(record))
    if json_file is not None:
        json_file.write_text(json.dumps(record, indent=2) + "\n")


def _settings(system: TextToImage, sampling: Sampling, timer: Timer, driver: Driver | None, why: str) -> Json:
    return {
        **machine(system.device, driver, components(system)),
        "driver_missing": why or None,
        "sampling": asdict(sampling),
        "evaluations": sum(timer.evaluations.values()),
        "rows_a_forward": "2 B" if sampling.guidance != 1 else "B",
        "inside": "tokenizing, text encoder, denoiser, decoder to floats; not: rounding to 8 bits, copying to the host",
        "warmup": timer.warmup,
        "repeats": timer.repeats,
        "measured_steps": timer.measured_steps,
    }
