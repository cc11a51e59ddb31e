"""The costs of making an image: as a record, as a table, and the machine that they were measured on."""

import platform
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sana_lab import environment
from sana_lab.costs.flops import by_component
from sana_lab.costs.live_memory import Memory
from sana_lab.costs.nvml import Driver
from sana_lab.costs.timing import Energy, Percentile, Samples, plain
from sana_lab.types import Json

STAGES = ("text", "denoise", "decode")


class Seconds(NamedTuple):
    """A latency with the bounds of its 95 % interval; sums of medians carry the sums of bounds, which is cautious."""

    median: float
    low: float
    high: float
    tails: dict[str, Percentile] | None = None  # p50, p90, p99; None of a sum
    first: float | None = None  # of the first calls: compilation and tuning are in it
    n: int = 0

    @classmethod
    def of(cls, samples: Samples, times: int = 1) -> "Seconds":
        """`times` calls, of which the samples are each one."""
        timing = samples.timing
        bounds = (timing.median_s * times, timing.low_s * times, timing.high_s * times)
        return cls(*bounds, tails(samples) if times == 1 else None, samples.first_s, timing.n)

    def plus(self, *others: "Seconds") -> "Seconds":
        every = (self, *others)
        median, low, high = (sum(values) for values in zip(*(s[:3] for s in every), strict=True))
        return Seconds(median, low, high, None, total_first(every), min(s.n for s in every))


class Costs(NamedTuple):
    """By stage and "total"; a peer's stage that was not seen has none."""

    seconds: Mapping[str, Seconds]
    macs: Mapping[str, float]  # 10^9 of an image, and "forward": of one denoiser forward
    memory: Mapping[str, Memory]
    energy: Mapping[str, Energy | None]


def table(record: Json) -> str:
    """The record for a reader: one line a stage, one a batch of the sweep, then the definitions."""
    head = f"{'stage':<9}{'params M':>10}{'GMACs':>12}{'latency s':>12}{'95 % interval':>19}{'p90 s':>10}{'p99 s':>10}"
    lines = [_line(name, stage) for name, stage in record["stages"].items()]
    size, latent = record["size"], "x".join(map(str, record.get("latent", ())))
    grid = f", latents {latent}" if latent else ""
    tokens = f", {record['tokens']} tokens" if "tokens" in record else ""
    title = f"{size}x{size} pixels{grid}{tokens}, {record['text_tokens']} of text"
    speed = f"{record['images_per_s']:.4g} images/s at batch {record['batch']}; {record['settings']['device']}"
    swept = _sweep_lines(record["sweep"]) if "sweep" in record else []
    return "\n".join(
        [title, head + f"{'peak MiB':>11}{'J':>9}", *lines, speed, *swept, *(f"- {note}" for note in record["notes"])]
    )


def headline(modules: Mapping[str, nn.Module], costs: Costs, speed: float) -> Json:
    """The columns of a table."""
    total, used = costs.memory["total"], costs.energy.get("total")
    return {
        "params_m": by_component(dict(modules))["all"]["total"] / 1e6,
        "gmacs": costs.macs["forward"],
        "gmacs_image": costs.macs["total"],
        "latency_s": costs.seconds["total"].median,
        "images_per_s": speed,
        "peak_mib": total.peak_mib,
        "reserved_mib": total.reserved_mib,
        "weights_mib": mib_of(weights_of(modules.values())),
        "energy_j": None if used is None else used.joules,
    }


def by_stage(
    modules: Mapping[str, nn.Module], names: Mapping[str, str], costs: Costs, whole: nn.Module | None = None
) -> Json:
    """By stage and in total; `names` says which component makes a stage."""
    params = by_component(dict(modules))
    if whole is not None:
        params["all"] = by_component({"whole": whole})["all"]
    return {
        name: {
            **_counted(params[names.get(name, "all")]),
            "gmacs": costs.macs[name],
            **_timed(costs.seconds[name]),
            **_weighed(costs.memory[name]),
            "energy_j": None if (used := costs.energy.get(name)) is None else used.joules,
        }
        for name in (*STAGES, "total")
        if name in costs.seconds
    }


def _counted(params: dict[str, int]) -> Json:
    return {"params_m": params["total"] / 1e6, "trainable_m": params["trainable"] / 1e6}


def _timed(seconds: Seconds) -> Json:
    found = {"latency_s": seconds.median, "low_s": seconds.low, "high_s": seconds.high}
    tails = {} if seconds.tails is None else {name: tail._asdict() for name, tail in seconds.tails.items()}
    return {**found, **tails, "first_s": seconds.first, "n": seconds.n}


def _weighed(memory: Memory) -> Json:
    return {k: getattr(memory, k) for k in ("peak_mib", "reserved_mib", "resident_mib")}


def machine(device: torch.device, driver: Driver | None, modules: Mapping[str, nn.Module]) -> Json:
    """Everything that a time depends on beside the model; clocks are read after the calls that were timed."""
    cuda = device.type == "cuda"
    return {
        "device": device_name(device),
        "gpu": None if driver is None else driver.facts(),
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": environment.cpu_model(),
        "cores": environment.cores(),
        "threads": torch.get_num_threads(),
        "dtype": {name: str(next(m.parameters()).dtype).removeprefix("torch.") for name, m in modules.items()},
        "compile": {name: compile_mode(m) for name, m in modules.items()},
        "float32_matmul": torch.get_float32_matmul_precision(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "sync": "the device is synchronised before and after each timed call" if cuda else "calls return when done",
        "clock": "the host's",
    }


def compile_mode(module: nn.Module) -> str:
    """Whether any of it runs compiled; its graphs are captured in the first call."""
    parts = module.modules()
    compiled = any(type(m).__name__ == "OptimizedModule" or m._compiled_call_impl is not None for m in parts)
    return "torch.compile" if compiled else "eager"


def _line(name: str, stage: Json) -> str:
    interval = f"{stage['low_s']:.3g} to {stage['high_s']:.3g}"
    tails = "".join(f"{_number(stage.get(p, {}).get('value')):>10}" for p in ("p90", "p99"))
    numbers = f"{stage['gmacs']:>12.4g}{stage['latency_s']:>12.4g}{interval:>19}{tails}{stage['peak_mib']:>11.1f}"
    return f"{name:<9}{stage['params_m']:>10.3f}{numbers}{_number(stage['energy_j']):>9}"


def _sweep_lines(swept: Json) -> list[str]:
    head = f"{'batch':<9}{'images/s':>10}{'95 % interval':>21}{'peak MiB':>11}{'reserved':>10}{'J/image':>9}"
    best = f"best {swept['images_per_s']:.4g} images/s at batch {swept['batch']}; ended by {swept['ended_by']}"
    return [head, *map(_sweep_line, swept["rungs"]), best]


def _sweep_line(rung: Json) -> str:
    interval = "{:.4g} to {:.4g}".format(*rung["images_per_s_interval"])
    memory = f"{rung['peak_mib']:>11.1f}{_number(rung['reserved_mib']):>10}{_number(rung['energy_j_image']):>9}"
    return f"{rung['batch']:<9}{rung['images_per_s']:>10.4g}{interval:>21}{memory}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{environment.cpu_model()}, {torch.get_num_threads()} threads"


def tails(samples: Samples) -> dict[str, Percentile]:
    """Latency by percentile."""
    return {f"p{q}": Percentile.of(samples.wall, q / 100) for q in (50, 90, 99)}


def total_first(parts: Iterable[Seconds]) -> float | None:
    """The first calls of all parts together; None where one has no warm-up."""
    firsts = [part.first for part in parts]
    known = [first for first in firsts if first is not None]
    return sum(known) if len(known) == len(firsts) else None


def weights_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    """All parameters and buffers, a shared one once."""
    return list({id(t): t for m in modules for t in (*m.parameters(), *m.buffers())}.values())


def mib_of(tensors: Iterable[Tensor]) -> float:
    return sum(p.numel() * p.element_size() for t in tensors for p in plain(t)) / 2**20
