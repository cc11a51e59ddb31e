"""`sana-lab bench`: parameters, MACs, latency, throughput, memory and energy of an image by stage.

The input is random noise, and weights may be untrained: speed does not depend on either.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from sana_lab.bench.peer_stages import PeerSettings, measure_peer, time_peer
from sana_lab.bench.record import COMPONENTS, Costs, headline, machine, stage_rows, table
from sana_lab.bench.stages import (
    StageTimer,
    components,
    computed_share,
    count_stages,
    eval_mode,
    evaluation_times,
    measure_energy,
    measure_memory,
    stage_calls,
)
from sana_lab.bench.untrained import build_untrained
from sana_lab.checkpoints.build import build_on_meta
from sana_lab.config import experiments
from sana_lab.config.atomic_write import write_text
from sana_lab.config.paths import check_file
from sana_lab.config.specs import Spec
from sana_lab.costs import nvml
from sana_lab.costs.batch_sweep import BatchTrial, host_shortfall, sweep
from sana_lab.costs.flops import DEFINITION, PAIR, count_pair_macs
from sana_lab.costs.nvml import NvmlDevice
from sana_lab.costs.out_of_memory import advise_on_out_of_memory
from sana_lab.costs.timing import clock_for, energy_per_call, samples_needed
from sana_lab.costs.too_large import check_pixels
from sana_lab.diffusion.guidance import reads_null
from sana_lab.diffusion.sampling import Sampling
from sana_lab.models.dit import Dit
from sana_lab.peers.pipeline import Peer
from sana_lab.report import record_page
from sana_lab.systems.quantize import quantize
from sana_lab.types import Json, Time

if TYPE_CHECKING:
    from sana_lab.systems.text2image import TextToImage

PROMPTS = ("a photo of a red circle left of a blue square", "a photo of three green triangles")
ENERGY_S = 2.0
"""Seconds that `sana-lab bench` repeats a stage to measure its energy; counters are updated some ten times a second."""


@torch.no_grad()
def bench(
    system: "TextToImage",
    sampling: Sampling,
    size: int,  # pixels a side
    batch: int = 1,  # images of the throughput and memory measurement; latency is at 1
    prompts: Sequence[str] = PROMPTS,  # repeated to fill a batch
    repeats: int = 5,  # timed calls; the median is reported
    measured_steps: int | None = None,  # number of denoiser evaluations to time instead of all steps
    warmup: int = 1,  # calls before timing
    max_batch: int | None = None,  # largest batch of a throughput sweep; None disables it
    energy_s: float = 0.0,  # seconds to repeat each stage for measuring energy; 0 disables it
) -> Json:
    """The cost of images as plain data; its `notes` define every number.

    With `measured_steps` the time of the denoiser is the median of one evaluation times the number of evaluations.
    If `sampling` quantises, the denoiser stays quantised. ValueError for a size that is not a multiple of the
    autoencoder's downsampling and the patch.
    """
    _check(batch, prompts)
    _check_cache(sampling, measured_steps)
    gpu, no_gpu = nvml.find_device(system.device)
    with eval_mode(components(system).values()):
        evaluations = evaluation_times(sampling, system.flow)
        gmacs = _unquantised_gmacs(system, sampling, size, prompts, evaluations)
        quantize(system.dit, sampling.precision)
        one = stage_calls(system, sampling, size, 1, prompts)
        timer = StageTimer(sampling, evaluations, repeats, measured_steps, warmup, system.device)
        latency = timer.stages(one)
        many = one if batch == 1 else stage_calls(system, sampling, size, batch, prompts)
        total = latency["total"] if batch == 1 else timer.total(many)
        costs = Costs(
            latency,
            gmacs or count_stages(one, evaluations),
            measure_memory(system, many, sampling),
            measure_energy(one, sampling, gpu, energy_s),
        )
        del many
        trial = partial(_batch_trial, system, timer, size, prompts, gpu, energy_s)
        swept = {} if max_batch is None else {"sweep": sweep(trial, max_batch, _shortfall(system.device))}
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
        "stages": stage_rows(components(system), COMPONENTS, costs),
        **swept,
        **({} if sampling.cache is None else {"blocks_computed": 100 * computed_share(system.dit, one, sampling)}),
        "settings": _settings(system, timer, gpu, no_gpu),
        "notes": notes(
            system.dit, sampling, sum(evaluations.values()), batch, measured_steps, costs.memory["total"].method
        )
        + _common_notes(repeats, no_gpu if energy_s else "not requested", "sweep" in swept),
    }


@torch.no_grad()
def bench_peer(
    peer: Peer,
    size: int,
    *,
    steps: int | None = None,  # None is the pipeline's default
    guidance: float | None = None,  # None is the pipeline's default
    batch: int = 1,
    prompts: Sequence[str] = PROMPTS,
    repeats: int = 5,
    warmup: int = 1,
    max_batch: int | None = None,
    energy_s: float = 0.0,
) -> Json:
    """The cost of images by a diffusers pipeline, in the columns of `bench`."""
    _check(batch, prompts)
    gpu, no_gpu = nvml.find_device(peer.device)
    settings = PeerSettings(size, steps, guidance, repeats, warmup, gpu, energy_s)
    texts = partial(_repeated, prompts)
    with eval_mode(peer.networks.values()):
        costs, tokens = measure_peer(peer, settings, texts(1), texts(batch))
        total = costs.latency["total"] if batch == 1 else time_peer(peer, settings, texts(batch))
        trial = partial(_peer_batch_trial, peer, settings, prompts)
        swept = {} if max_batch is None else {"sweep": sweep(trial, max_batch, _shortfall(peer.device))}
    stages = cast("dict[str, nn.Module]", peer.stages())
    return {
        "size": size,
        "batch": batch,
        "text_tokens": tokens,
        **({"latent": list(peer.latent_shape(size))} if peer.noise == "latents" else {}),
        **headline(peer.networks, costs, batch / total.median),
        "stages": stage_rows(stages, {name: name for name in stages}, costs, nn.ModuleDict(peer.networks)),
        **swept,
        "settings": {
            **machine(peer.device, gpu, peer.networks),
            "peer": peer.identity(),
            "sampling": {"steps": steps, "guidance": guidance},
            "warmup": warmup,
            "repeats": repeats,
        },
        "notes": _peer_notes(batch, costs.memory["total"].method)
        + _common_notes(repeats, no_gpu if energy_s else "not requested", "sweep" in swept),
    }


def main(
    experiment: Json,
    *,
    name: str = "an experiment",
    size: int | None,
    batch: int,
    repeats: int,
    json_file: Path | None,
    html_file: Path | None = None,
    max_batch: int | None = None,
) -> None:
    """`sana-lab bench`: print the costs of a resolved experiment's untrained system, and write them to `json_file`."""
    check_file(json_file)
    check_file(html_file)
    size = size or experiment["eval"]["bench_size"] or experiments.image_size(experiment["data"])
    check_pixels("--batch", batch, size)
    options: Json = {"size": size, "batch": batch, "repeats": repeats, "max_batch": max_batch, "energy_s": ENERGY_S}

    def advice() -> list[str]:
        from sana_lab.bench import memory_advice

        return memory_advice.experiment_advice(experiment, size, batch, "--batch")

    with advise_on_out_of_memory(advice):
        record = bench_experiment(experiment, **options)
    _write(record, json_file, html_file, name)


def main_peer(
    reference: str,
    *,
    size: int,
    batch: int,
    repeats: int,
    json_file: Path | None,
    html_file: Path | None = None,
    max_batch: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    half: bool = True,
) -> None:
    """`sana-lab bench` of a diffusers pipeline's folder or hub id; on CUDA in bfloat16 unless `half` is False."""
    check_file(json_file)
    check_file(html_file)
    cuda = torch.cuda.is_available()
    peer = Peer.load(reference, dtype=torch.bfloat16 if cuda and half else torch.float32)
    options: Json = {"steps": steps, "guidance": guidance, "repeats": repeats, "max_batch": max_batch}
    _write(bench_peer(peer, size, batch=batch, energy_s=ENERGY_S, **options), json_file, html_file, reference)


def bench_experiment(
    experiment: Json,
    *,
    size: int | None = None,
    batch: int | None = None,
    repeats: int | None = None,
    max_batch: int | None = None,
    energy_s: float = 0.0,
) -> Json:
    """`bench` of a resolved experiment; arguments that are None come from its `eval.bench_*` options."""
    options = experiment["eval"]
    return bench(
        build_untrained(experiment),
        Sampling(**experiment["sampling"]),
        size or options["bench_size"] or experiments.image_size(experiment["data"]),
        options["bench_batch"] if batch is None else batch,
        repeats=options["bench_repeats"] if repeats is None else repeats,
        measured_steps=options["bench_steps"],
        max_batch=max_batch,
        energy_s=energy_s,
    )


def pair_tmacs(dit: Spec, latent: Sequence[int], text_dim: int) -> float:
    """10^12 MACs of a denoiser on latents (C, h, w) by the SANA paper's convention (`flops.PAIR`); needs no weights."""
    bare = build_on_meta("dit", dit, channels=latent[0], text_dim=text_dim)
    return count_pair_macs(bare.without_guidance, latent, text_dim) / 1e12


def notes(
    dit: Dit, sampling: Sampling, evaluations: int, batch: int, measured_steps: int | None, memory: str
) -> list[str]:
    """The definitions of a record's numbers."""
    is_guided = reads_null(dit, sampling.guidance)
    solver = sampling.solver if isinstance(sampling.solver, str) else sampling.solver["name"]
    how = "all timed" if measured_steps is None else f"median of {measured_steps} evaluations times {evaluations}"
    rows = (
        "without guidance" if not is_guided and not sampling.pag else f"one batched forward of {_rows(dit, sampling)}"
    )
    if is_guided and sampling.guidance_interval is not None:
        low, high = sampling.guidance_interval
        rows += f" each from t {low} to {high}, of {'2 B' if sampling.pag else 'B'} elsewhere"
    elif is_guided or sampling.pag:
        rows += " each"
    rows += f"; {sampling.best_of} candidates of each image, the choice not timed" * (sampling.best_of > 1)
    cached = [] if sampling.cache is None else ["blocks_computed: share of the blocks' rows that one image's steps ran"]
    whole = "timed as a whole" if measured_steps is None else "the sum of the stages"
    return [
        f"gmacs: one denoiser forward at batch 1 without guidance, caption projection included; {DEFINITION}",
        f"tmacs_pair: {PAIR}",
        f"gmacs by stage: one image: text{' and empty prompt' if is_guided else ''}, {evaluations} evaluations, decode",
        f"denoise: {sampling.steps} {solver} steps, {evaluations} evaluations, {rows}; {how}; captions prepared once, "
        "modulation vectors of all times at once",
        "text: every prompt is new; a frozen decoder with `cache` encoded the instruction and the empty prompt before",
        f"latency: median at batch 1 after warm-up, with its 95 % interval; total: {whole}; decoded to floats",
        "first_s: the first call, with compilation and tuning; of the denoiser one evaluation where not all are timed",
        f"images_per_s: {batch} / latency of a batch of {batch}",
        f"peak_mib: at batch {batch}, weights of all stages included; {memory}; total: the largest stage",
        "params_m: all three networks, shared parameters once, without the averaged (EMA) copy",
        *cached,
    ]


def _unquantised_gmacs(
    system: "TextToImage", sampling: Sampling, size: int, prompts: Sequence[str], evaluations: dict[Time, int]
) -> dict[str, float] | None:
    """Counts of a denoiser before quantisation, because 8-bit products are not counted; None without quantisation."""
    if sampling.precision == system.dit.quantized:
        return None
    return count_stages(stage_calls(system, sampling, size, 1, prompts), evaluations)


def _common_notes(repeats: int, no_energy: str, swept: bool) -> list[str]:
    needed = ", ".join(f"p{q} {samples_needed(q / 100)}" for q in (50, 90, 99))
    missing = ", ".join(f"p{q}" for q in (50, 90, 99) if repeats < samples_needed(q / 100))
    enough = f"too few for {missing}" if missing else "enough for all"
    energy = (
        "of one image, the whole device's by the driver's counter" if not no_energy else f"not measured: {no_energy}"
    )
    return [
        f"p50, p90, p99: intervals by order statistics; both bounds need calls: {needed}; here {repeats}, {enough}",
        f"energy_j: {energy}",
        *(["sweep: whole images, doubling the batch; the interval is that of the median"] if swept else []),
    ]


def _peer_notes(batch: int, memory: str) -> list[str]:
    return [
        f"gmacs: one call of the denoiser at batch 1 with guidance 1; {DEFINITION}",
        "gmacs by stage: one image, in the calls that the pipeline makes",
        "latency: of the whole pipeline at batch 1, to 8-bit images; stages: their networks alone, timed in other runs "
        "with the device synchronised around every call; the rest of the total is tokenizing, scheduling and the host",
        "first_s: the first call, with compilation and tuning",
        f"images_per_s: {batch} / latency of a batch of {batch}",
        f"peak_mib: at batch {batch}, weights of all components included; {memory}; of a stage: its first call",
        "params_m: all components with weights, shared parameters once",
    ]


def _batch_trial(
    system: "TextToImage",
    timer: StageTimer,
    size: int,
    prompts: Sequence[str],
    gpu: NvmlDevice | None,
    energy_s: float,
    batch: int,
) -> BatchTrial:
    """The cost of a batch of whole images."""
    calls = stage_calls(system, timer.sampling, size, batch, prompts)
    memory = measure_memory(system, calls, timer.sampling)["total"]
    latency = timer.total(calls)
    energy = energy_per_call(calls.image, gpu.joules, energy_s, clock_for(system.device)) if gpu and energy_s else None
    return BatchTrial(batch, latency[:3], memory, energy)


def _peer_batch_trial(peer: Peer, settings: PeerSettings, prompts: Sequence[str], batch: int) -> BatchTrial:
    texts = _repeated(prompts, batch)
    memory = settings.memory(peer, texts)
    return BatchTrial(batch, time_peer(peer, settings, texts)[:3], memory, settings.energy(peer, texts))


def _rows(dit: Dit, sampling: Sampling) -> str:
    """Rows of one forward for B images: the prompts', the null texts' and the perturbed ones."""
    rows = sampling.best_of * (1 + reads_null(dit, sampling.guidance) + (sampling.pag > 0))
    return "B" if rows == 1 else f"{rows} B"


def _shortfall(device: torch.device) -> Callable[[BatchTrial], str | None]:
    """Memory check before a batch on the host; none on a GPU, whose allocator raises."""
    return host_shortfall if device.type == "cpu" else lambda trial: None


def _repeated(prompts: Sequence[str], count: int) -> list[str]:
    return list(islice(cycle(prompts), count))


def _check_cache(sampling: Sampling, measured_steps: int | None) -> None:
    if sampling.cache is not None and measured_steps is not None:
        raise ValueError(
            f"measured_steps is {measured_steps}, and under sampling.cache steps differ in cost; expected None, all of "
            "them (eval.bench_steps=null)"
        )


def _check(batch: int, prompts: Sequence[str]) -> None:
    if batch < 1:
        raise ValueError(f"bench batch is {batch}, expected at least 1")
    if not prompts or isinstance(prompts, str):
        raise ValueError(f"bench prompts are {prompts!r}, expected a list of at least one text")


def _write(record: Json, json_file: Path | None, html_file: Path | None, name: str) -> None:
    print(table(record))
    if json_file is not None:
        write_text(json_file, json.dumps(record, indent=2) + "\n")
    if html_file is not None:
        write_text(html_file, record_page.benchmark(name, record))


def _settings(system: "TextToImage", timer: StageTimer, gpu: NvmlDevice | None, no_gpu: str) -> Json:
    return {
        **machine(system.device, gpu, components(system)),
        "driver_missing": no_gpu or None,
        "sampling": asdict(timer.sampling),
        "evaluations": sum(timer.evaluations.values()),
        "rows_a_forward": _rows(system.dit, timer.sampling),
        "inside": "tokenizing, text encoder, denoiser, decoder to floats; not: rounding to 8 bits, copying to the host",
        "warmup": timer.warmup,
        "repeats": timer.repeats,
        "measured_steps": timer.measured_steps,
    }
