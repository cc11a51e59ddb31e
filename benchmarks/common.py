"""The protocol of the benchmarks: parity before time, interleaved runs, medians with spread, no ratio from noise."""

import json
import math
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from itertools import count, cycle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sana_lab.bench.record import device_name
from sana_lab.costs.timing import MAX_NOISE, MIN_PAIRS, Clock, Comparison, Timing, clock_for, interleave
from sana_lab.types import Json

RESULTS = Path(__file__).parent / "results"

SAME, EXACT, OTHER = "same work", "exact algebra", "another function"
"""What a ratio compares: the same operations; fewer operations for equal outputs; or two different functions."""

Run = Callable[[Any], Tensor]


class Side(NamedTuple):
    """One implementation, and the expected output for the first input, computed independently or by the peer."""

    run: Run
    truth: Tensor
    check: Run | None = None  # shorter run whose output is compared with the truth, where the timed one is too long


class Pair(NamedTuple):
    """A ratio to measure: time of `peer` over time of `ours`."""

    tier: str
    peer: str
    ours: str


class Case(NamedTuple):
    """Implementations by name on the same inputs, timed in turns. Parity is against float64 where possible."""

    name: str
    sides: Mapping[str, Side]
    pairs: list[Pair]
    inputs: list[Any]  # fresh noise for each repeat in turn
    tolerance: float = 1e-4  # of the relative L2 error; at most LOOSEST
    least_bytes: int = 0  # bytes that ours must read and write, where bandwidth is the limit
    repeats: int | None = None  # overrides the protocol's repeats, for long calls


LOOSEST = 0.1
"""Largest tolerance of a case. An output of zeros has the error 1."""


class Protocol(NamedTuple):
    """Timing settings, the same for all cases of a run."""

    device: torch.device
    warmup: int
    repeats: int
    clock: Clock | None = None
    stretch_s: float = 0.02  # minimum length of a reading; shorter calls are repeated and the time divided


def error(output: Tensor, truth: Tensor) -> float:
    """Relative L2 error."""
    truth = truth.double()
    return float((output.double() - truth).norm() / truth.norm())


@torch.no_grad()
def run_case(case: Case, protocol: Protocol) -> list[Json]:
    """Print parity, times and ratios of a case; return them as plain data, one record per pair.

    ValueError for a tolerance above LOOSEST.
    """
    if case.tolerance > LOOSEST:
        raise ValueError(f"{case.name}: tolerance {case.tolerance}, expected at most {LOOSEST}")
    errors = {name: error((side.check or side.run)(case.inputs[0]), side.truth) for name, side in case.sides.items()}
    print(f"\n{case.name}\n  error: " + ", ".join(f"{name} {e:.1e}" for name, e in errors.items()), flush=True)
    right = [name for name, e in errors.items() if e <= case.tolerance]
    for name in case.sides.keys() - {*right}:
        print(f"  {name} is off by more than {case.tolerance:.0e}: not timed")
    pairs = [p for p in case.pairs if p.peer in right and p.ours in right]
    times, inner = time_sides(case, protocol, {n for p in pairs for n in (p.peer, p.ours)}, {p.peer for p in pairs})
    for name, timing in times.items():
        print(line(name, timing), flush=True)
    records = []
    for pair in case.pairs:
        record = {"case": case.name, **pair._asdict(), "peer_error": errors[pair.peer], "ours_error": errors[pair.ours]}
        ratio = compared(pair, times) if pair in pairs else {"ratio": None, "why": "outputs differ"}
        records.append(record | {"inner": inner} | ratio if pair in pairs else record | ratio)
    return records


def time_sides(
    case: Case, protocol: Protocol, names: set[str], peers: set[str]
) -> tuple[dict[str, Timing], dict[str, int]]:
    """Timings by name, all sides in turns, each peer twice per turn; and the number of calls per reading."""
    runs = {name: case.sides[name].run for name in case.sides if name in names}
    inner = {name: times_to_stretch(run, case, protocol) for name, run in runs.items()}
    calls = {name: rotating(run, case.inputs, inner[name]) for name, run in runs.items()}
    calls |= {again(name): rotating(runs[name], case.inputs, inner[name]) for name in runs if name in peers}
    if not calls:
        return {}, inner
    long = case.repeats is not None and protocol.device.type == "cpu"
    warmup, repeats = 0 if long else protocol.warmup, min(protocol.repeats, case.repeats or protocol.repeats)
    timings = interleave(calls, warmup, repeats, protocol.device, protocol.clock)
    return {n: divided(t, inner[n.removesuffix(AGAIN)]) for n, t in timings.items()}, inner


def thread_clock(call: Callable[[], Any]) -> tuple[float, None]:
    """Processor time of this thread, for single-threaded calls on a shared machine."""
    start = time.thread_time()
    call()
    return time.thread_time() - start, None


AGAIN = ", again"


def again(name: str) -> str:
    """Name of a peer's second turn in a round; its difference from the first measures the machine's noise."""
    return name + AGAIN


def times_to_stretch(run: Run, case: Case, protocol: Protocol) -> int:
    """Number of calls per reading, from the time of the second call."""
    call, clock = rotating(run, case.inputs, 1), protocol.clock or clock_for(protocol.device)
    first = min(seconds for seconds in clock(call) if seconds is not None)
    if first > 10 * protocol.stretch_s:
        return 1
    second = min(seconds for seconds in clock(call) if seconds is not None)
    return max(1, math.ceil(protocol.stretch_s / second))


def rotating(run: Run, inputs: list[Any], inner: int) -> Callable[[], None]:
    """A call that takes the next input each time, so that no result or cache line is reused."""
    following = cycle(inputs)

    def call() -> None:
        for _ in range(inner):
            run(next(following))

    return call


def fresh(run: Callable[[int], Tensor]) -> Run:
    """Run with 0, 1, 2 ... regardless of the input, so that no prompt is encoded twice or cached."""
    numbers = count()
    return lambda _: run(next(numbers))


def divided(timing: Timing, inner: int) -> Timing:
    """The timing of one call, from readings of `inner` calls."""
    return timing._replace(**{k: v / inner for k, v in timing._asdict().items() if k.endswith("_s") and v is not None})


def line(name: str, timing: Timing) -> str:
    median, low, spread = (1e3 * s for s in (timing.typical_s, timing.min_s, timing.iqr_s))
    return f"  {name:<44}{median:>11.3f} ms   min {low:.3f}, quartiles {spread:.3f} apart, n {timing.n}"


def compared(pair: Pair, times: Mapping[str, Timing]) -> Json:
    """The ratio of medians, or the reason for its absence, as plain data."""
    peer, ours = times[pair.peer], times[pair.ours]
    comparison = Comparison.of(peer, ours, times[again(pair.peer)])
    why = None
    if comparison.ratio is None:
        few = f"{peer.n} rounds, and {MIN_PAIRS} are needed"
        noisy = f"{pair.peer} differs from itself by {comparison.noise:.1%}, more than {MAX_NOISE:.0%}"
        why = few if peer.n < MIN_PAIRS else noisy
    result = f"{comparison.ratio:.2f}x  (A against A: {comparison.noise:.1%})" if comparison.ratio else f"none: {why}"
    print(f"  {pair.peer} / {pair.ours}  [{pair.tier}]: {result}", flush=True)
    both = {"peer": peer._asdict(), "ours": ours._asdict()}
    return {"times": both, "noise": comparison.noise, "ratio": comparison.ratio, "why": why}


def environment(device: torch.device) -> Json:
    """Device, versions, precision settings and commit of a result."""
    packages = {p: metadata.version(p) for p in ("torch", "diffusers", "transformers", "triton") if installed(p)}
    return {
        "device": device_name(device),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": packages,
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        "tf32_cudnn": torch.backends.cudnn.allow_tf32,
        "commit": commit(),
    }


def installed(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


def commit() -> str:
    """The checkout's commit, with "+" where files differ from it; "unknown" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12", "--dirty=+"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    return process.stdout.strip() or "unknown"


def table(records: Iterable[Json]) -> str:
    """All ratios, one line each."""
    records = list(records)
    wide = max(len(r["case"]) for r in records)
    lines = [f"{'case':<{wide}}  {'tier':<17}{'peer ms':>10}{'ours ms':>10}{'ratio':>8}  peer / ours"]
    for r in records:
        times = r.get("times", {})
        cells = [milliseconds(times[role]) if times else "-" for role in ("peer", "ours")]
        ratio = f"{r['ratio']:.2f}x" if r["ratio"] else "-"
        names = f"{r['peer']} / {r['ours']}"
        lines.append(f"{r['case']:<{wide}}  {r['tier']:<17}{cells[0]:>10}{cells[1]:>10}{ratio:>8}  {names}")
    return "\n".join(lines)


def milliseconds(timing: Json) -> str:
    return f"{1e3 * (timing['median_s'] if timing['device_s'] is None else timing['device_s']):.3f}"


def save(name: str, settings: Json, records: list[Json], device: torch.device, extra: Json | None = None) -> Path:
    """results/<name>-<device>.json, and -<instructions> of a CPU without AVX-512."""
    machine = environment(device)
    able = machine["cpu_capability"]
    kind = f"{machine['device']} {able}" if device.type == "cpu" and able != "AVX512" else str(machine["device"])
    slug = re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")
    path = RESULTS / f"{name}-{slug}.json"
    path.parent.mkdir(exist_ok=True)
    whole = {**machine, "settings": settings, **(extra or {}), "cases": records}
    path.write_text(json.dumps(whole, indent=2) + "\n")
    return path
