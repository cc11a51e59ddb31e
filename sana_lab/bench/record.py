"""The costs of an image as a record and as a table, with the machine of the measurement."""

import platform
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import NamedTuple

import torch
from torch import nn

from sana_lab import environment
from sana_lab.costs.flops import parameters_by_component
from sana_lab.costs.live_memory import Memory, module_tensors, tensor_bytes
from sana_lab.costs.nvml import NvmlDevice
from sana_lab.costs.timing import Energy, Percentile, Samples
from sana_lab.types import Json

COMPONENTS = {"text": "text_encoder", "denoise": "dit", "decode": "autoencoder"}
"""Sampling stage -> component of a text2image system that runs it."""

STAGES = tuple(COMPONENTS)


class Latency(NamedTuple):
    """Seconds with a 95 % interval; the bounds of a sum of medians are sums of bounds, which is conservative."""

    median: float
    low: float
    high: float
    percentiles: dict[str, Percentile] | None = None  # p50, p90, p99; None for a sum
    first: float | None = None  # of the first call, with compilation and tuning
    n: int = 0  # samples

    @classmethod
    def of(cls, samples: Samples, times: int = 1) -> "Latency":
        """The latency of `times` calls, from samples of one."""
        timing = samples.timing
        bounds = (timing.median_s * times, timing.low_s * times, timing.high_s * times)
        return cls(*bounds, _percentiles(samples) if times == 1 else None, samples.first_s, timing.n)

    def plus(self, *others: "Latency") -> "Latency":
        parts = (self, *others)
        median, low, high = (sum(values) for values in zip(*(part[:3] for part in parts), strict=True))
        return Latency(median, low, high, None, sum_of_first(parts), min(part.n for part in parts))


class Costs(NamedTuple):
    """Costs by stage and "total"; stages that a peer's pipeline lacks are absent."""

    latency: Mapping[str, Latency]
    gmacs: Mapping[str, float]  # per image; "forward" is one denoiser forward
    memory: Mapping[str, Memory]
    energy: Mapping[str, Energy | None]


def table(record: Json) -> str:
    """The record as text: a line per stage, a line per batch of the sweep, then the definitions."""
    head = f"{'stage':<9}{'params M':>10}{'GMACs':>12}{'latency s':>12}{'95 % interval':>19}{'p90 s':>10}{'p99 s':>10}"
    lines = [_line(name, stage) for name, stage in record["stages"].items()]
    size, latent = record["size"], "x".join(map(str, record.get("latent", ())))
    grid = f", latents {latent}" if latent else ""
    tokens = f", {record['tokens']} tokens" if "tokens" in record else ""
    title = f"{size}x{size} pixels{grid}{tokens}, {record['text_tokens']} of text"
    speed = f"{record['images_per_s']:.4g} images/s at batch {record['batch']}; {record['settings']['device']}"
    sweep = _sweep_lines(record["sweep"]) if "sweep" in record else []
    return "\n".join(
        [title, head + f"{'peak MiB':>11}{'J':>9}", *lines, speed, *sweep, *(f"- {note}" for note in record["notes"])]
    )


def headline(modules: Mapping[str, nn.Module], costs: Costs, images_per_s: float) -> Json:
    """The totals, under the names of table columns."""
    total, energy = costs.memory["total"], costs.energy.get("total")
    return {
        "params_m": parameters_by_component(dict(modules))["all"]["total"] / 1e6,
        "gmacs": costs.gmacs["forward"],
        "gmacs_image": costs.gmacs["total"],
        "latency_s": costs.latency["total"].median,
        "images_per_s": images_per_s,
        "peak_mib": total.peak_mib,
        "reserved_mib": total.reserved_mib,
        "weights_mib": tensor_bytes(module_tensors(modules.values())) / 2**20,
        "energy_j": None if energy is None else energy.joules,
    }


def stage_rows(
    modules: Mapping[str, nn.Module], names: Mapping[str, str], costs: Costs, whole: nn.Module | None = None
) -> Json:
    """One row per stage and one for the total; `names` maps stages to components, `whole` is the total's module."""
    params = parameters_by_component(dict(modules))
    if whole is not None:
        params["all"] = parameters_by_component({"whole": whole})["all"]
    return {
        name: {
            **_parameters(params[names.get(name, "all")]),
            "gmacs": costs.gmacs[name],
            **_latency(costs.latency[name]),
            **_memory(costs.memory[name]),
            "energy_j": None if (energy := costs.energy.get(name)) is None else energy.joules,
        }
        for name in (*STAGES, "total")
        if name in costs.latency
    }


def _parameters(params: dict[str, int]) -> Json:
    return {"params_m": params["total"] / 1e6, "trainable_m": params["trainable"] / 1e6}


def _latency(latency: Latency) -> Json:
    percentiles = {name: value._asdict() for name, value in (latency.percentiles or {}).items()}
    interval = {"low_s": latency.low, "high_s": latency.high}
    return {"latency_s": latency.median, **interval, **percentiles, "first_s": latency.first, "n": latency.n}


def _memory(memory: Memory) -> Json:
    return {k: getattr(memory, k) for k in ("peak_mib", "reserved_mib", "resident_mib")}


def machine(device: torch.device, gpu: NvmlDevice | None, modules: Mapping[str, nn.Module]) -> Json:
    """Machine and settings that affect timings; call after the timed calls, because it reads GPU clocks."""
    cuda = device.type == "cuda"
    return {
        "device": device_name(device),
        "gpu": None if gpu is None else gpu.facts(),
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": environment.cpu_model(),
        "cores": environment.cores(),
        "threads": torch.get_num_threads(),
        "dtype": {
            name: str(p.dtype).removeprefix("torch.") for name, m in modules.items() for p in islice(m.parameters(), 1)
        },
        "compile": {name: compile_mode(m) for name, m in modules.items()},
        "float32_matmul": torch.get_float32_matmul_precision(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "sync": "the device is synchronised before and after each timed call" if cuda else "calls return when done",
        "clock": "the host's",
    }


def compile_mode(module: nn.Module) -> str:
    """ "torch.compile" if any submodule is compiled, else "eager"."""
    parts = module.modules()
    compiled = any(type(m).__name__ == "OptimizedModule" or m._compiled_call_impl is not None for m in parts)
    return "torch.compile" if compiled else "eager"


def _line(name: str, stage: Json) -> str:
    interval = f"{stage['low_s']:.3g} to {stage['high_s']:.3g}"
    tails = "".join(f"{_number(stage.get(p, {}).get('value')):>10}" for p in ("p90", "p99"))
    numbers = f"{stage['gmacs']:>12.4g}{stage['latency_s']:>12.4g}{interval:>19}{tails}{stage['peak_mib']:>11.1f}"
    return f"{name:<9}{stage['params_m']:>10.3f}{numbers}{_number(stage['energy_j']):>9}"


def _sweep_lines(sweep: Json) -> list[str]:
    head = f"{'batch':<9}{'images/s':>10}{'95 % interval':>21}{'peak MiB':>11}{'reserved':>10}{'J/image':>9}"
    best = f"best {sweep['images_per_s']:.4g} images/s at batch {sweep['batch']}; ended by {sweep['ended_by']}"
    return [head, *map(_sweep_line, sweep["trials"]), best]


def _sweep_line(trial: Json) -> str:
    interval = "{:.4g} to {:.4g}".format(*trial["images_per_s_interval"])
    memory = f"{trial['peak_mib']:>11.1f}{_number(trial['reserved_mib']):>10}{_number(trial['energy_j_image']):>9}"
    return f"{trial['batch']:<9}{trial['images_per_s']:>10.4g}{interval:>21}{memory}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{environment.cpu_model()}, {torch.get_num_threads()} threads"


def _percentiles(samples: Samples) -> dict[str, Percentile]:
    return {f"p{q}": Percentile.of(samples.wall, q / 100) for q in (50, 90, 99)}


def sum_of_first(parts: Iterable[Latency]) -> float | None:
    """Sum of the seconds of all parts' first calls; None if one has no warm-up."""
    firsts = [part.first for part in parts]
    return None if None in firsts else sum(first for first in firsts if first is not None)
