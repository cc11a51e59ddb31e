"""Side by side on one CUDA device: python benchmarks/gpu.py [--plan first|second] [--only SECTION ...] [--budget S]

Copy bandwidth and matrix-product throughput as references, then cores of linear attention, the operators between a
block's products, SANA's transformer, DC-AE's decoder and a whole pipeline, against diffusers: eager, compiled, and
replayed from CUDA graphs, with the same random weights. Each section is a process of its own with a time limit
(`sections.py`), each result a line of `--out`, the last output a table.
"""

import argparse
import copy
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cores
import models
import nvlabs_algorithm
import sections
import torch
from common import EXACT, OTHER, RESULTS, SAME, Case, Pair, Protocol, Run, Side, environment, fresh, run_case, table
from models import SIZES
from sections import Section
from torch import Tensor

from sana_lab.costs.timing import interleave
from sana_lab.diffusion.guidance import guided
from sana_lab.diffusion.sampling import Sampling, noise_like
from sana_lab.ops.backend import Backend
from sana_lab.ops.conv import upsample_conv3x3
from sana_lab.ops.inference_backend import Fast
from sana_lab.ops.linear_attention import launch, tiling
from sana_lab.ops.mix_ffn import mix_ffn
from sana_lab.ops.modulate import add_modulate
from sana_lab.systems.cuda_graphs import Graphs
from sana_lab.systems.quantize import layers, quantized
from sana_lab.types import Json, Text

BATCH, HEADS, WIDTH = 2, 36, 32  # SANA-0.6B under guidance
ROTATED = 200 * 2**20  # bytes of inputs in rotation: more than three times the L2 of an H200
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}  # against float64; the rounding error is printed beside
EPS = 1e-8  # of linear attention
DEEP = 0.1  # tolerance of a whole transformer in bfloat16 against float32
TOKENS, PADDED, STEPS = 80, 300, 20
MODE = "max-autotune-no-cudagraphs"


class Extent(NamedTuple):
    """Device and sizes; the CPU is for testing the cases, not for timing."""

    device: torch.device
    quick: bool = False
    compiled: bool = True

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.dtype]


Build = Callable[[], Case]


# The driver


def main(given: Sequence[str] | None = None) -> int:
    options = arguments(given)
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was measured (benchmarks/cpu.py runs anywhere)")
        return 0
    plan = [s for s in PLANS[options.plan] if s.name in options.only] if options.only else PLANS[options.plan]
    flags = ["--quick"] * options.quick + ["--skip-compile"] * options.skip_compile
    paths = os.pathsep.join([str(FOLDER), str(FOLDER.parent), os.environ.get("PYTHONPATH", "")])
    place = sections.Place("gpu", options.out, flags, {"PYTHONPATH": paths})
    report(sections.drive(plan, place, options.budget))
    print(f"written to {options.out}")
    return 0


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", choices=PLANS, default="all", help="sections and their time limits")
    parser.add_argument("--only", nargs="+", choices=[*SECTIONS, *COMMANDS], help="these sections of the plan alone")
    parser.add_argument("--budget", type=float, help="seconds in all; sections at the end are cut")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.jsonl", help="file that gets a line per result")
    parser.add_argument("--quick", action="store_true", help="few shapes and repeats, to see that it runs")
    parser.add_argument("--skip-compile", action="store_true", help="leave out torch.compile of the peer")
    return parser.parse_args(given)


def report(lines: Sequence[Json]) -> None:
    """Print what was not measured, and why, and then the table of ratios."""
    for line in lines:
        if why := line.get("error") or (line.get("why") if "case" not in line else None):
            print(f"{line['section']}: {line.get('case', '')} {why}")
    card = next((line["card"] for line in lines if "card" in line), None)
    for line in lines:
        if card and "ours_tb_s" in line:
            share = line["ours_tb_s"] / card["copy_tb_s"]
            print(f"{line['case']}: ours moves at least {line['ours_tb_s']:.2f} TB/s, {share:.0%} of a copy")
    records = [line for line in lines if "peer" in line]
    print("\n" + (table(records) if records else "no ratio was measured"))


# A section's process, called by `sections.child`


class Context(NamedTuple):
    """Settings of a section's process."""

    extent: Extent
    protocol: Protocol


def context(rest: Sequence[str]) -> Context:
    """Device and protocol; writes nothing."""
    device = torch.device("cuda")
    quick = "--quick" in rest
    extent = Extent(device, quick, "--skip-compile" not in rest)
    return Context(extent, Protocol(device, warmup=3, repeats=5 if quick else 21, stretch_s=2e-3))


def builders(section: str, context: Context) -> list[Build]:
    """What builds the cases of a section."""
    return SECTIONS[section](context.extent)


def label(build: Build) -> str:
    """Name of a case before it is built."""
    if not isinstance(build, partial):
        return build.__name__
    values = [str(v) for v in build.args if isinstance(v, str | int)]
    return " ".join([build.func.__name__.removesuffix("_case").replace("_", " "), *values])


def run(build: Build, context: Context) -> Iterator[Json]:
    """Build a case, compare and time it. Compiled code of other cases is dropped, so that shapes stay static."""
    torch._dynamo.reset()
    case = build()
    if not isinstance(case, Case):
        yield case
        return
    for record in run_case(case, context.protocol):
        yield with_bandwidth(record, case)
    del case
    torch.cuda.empty_cache()


def with_bandwidth(record: Json, case: Case) -> Json:
    """The record with the bytes per second that ours moves at least, for bandwidth-bound cases."""
    if not case.least_bytes or "times" not in record:
        return record
    return record | {"ours_tb_s": case.least_bytes / record["times"]["ours"]["device_s"] / 1e12}


def is_usable(context: Context) -> bool:
    """Whether the device still answers after an error."""
    try:
        torch.cuda.synchronize()
        return bool((torch.ones(8, device=context.extent.device) * 2).sum().item() == 16)
    except RuntimeError:
        return False


def card(extent: Extent) -> list[Build]:
    return [partial(reference, extent.device)]  # type: ignore[list-item]


def reference(device: torch.device) -> Json:
    """Versions, TB/s of a copy (read and write) and bfloat16 TFLOP/s of an 8192^3 product."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(2**28, device=device)
    target = torch.empty_like(source)
    times = interleave({"copy": lambda: target.copy_(source), "product": lambda: a @ b}, 3, 11, device)
    copy, product = times["copy"].typical_s, times["product"].typical_s
    limits = {"copy_tb_s": 2 * source.nbytes / copy / 1e12, "matmul_tflop_s": 2 * 8192**3 / product / 1e12}
    print(f"copy {limits['copy_tb_s']:.2f} TB/s, matmul {limits['matmul_tflop_s']:.0f} TFLOP/s", flush=True)
    return {"card": limits, "environment": environment(device)}


# Cores


def forward(extent: Extent) -> list[Build]:
    if extent.quick:
        return [partial(forward_case, extent, n) for n in (256, 1024)]
    cores_of = [partial(forward_case, extent, n) for n in (1024, 4096, 16384, 256)]
    return [*cores_of, *(partial(forms_case, extent, n) for n in (256, 512, 1024))]


def forward_case(extent: Extent, tokens: int, heads: int = HEADS) -> Case:
    """Each core replayed from a CUDA graph, to exclude launch overhead; buffers exceed the cache."""
    inputs = rotation(extent, tokens, heads)
    truth, other = cores.naive_linear(inputs[0], heads), cores.naive_softmax(inputs[0], heads)
    runs: dict[str, tuple[str, Run, Tensor]] = {
        "diffusers": (SAME, partial(cores.diffusers, heads=heads), truth),
        "ours in torch": (SAME, partial(cores.ours, heads=heads, backend="torch"), truth),
        "softmax (flash)": (OTHER, partial(cores.softmax, heads=heads), other),
    }
    if extent.compiled:
        runs["diffusers, compiled"] = (SAME, torch.compile(runs["diffusers"][1], mode=MODE, dynamic=False), truth)
    if extent.device.type == "cuda":
        config = nvlabs_algorithm.fastest(inputs[0], heads)
        runs["NVlabs' algorithm"] = (SAME, partial(nvlabs_algorithm.core, heads=heads, config=config), truth)
    sides = {name: Side(replayed(run, inputs), true) for name, (_, run, true) in runs.items()}
    sides["ours"] = Side(replayed(partial(cores.ours, heads=heads), inputs), truth)
    pairs = [Pair(tier, name, "ours") for name, (tier, _, _) in runs.items()]
    name = core_name("forward", extent, tokens, heads)
    return Case(name, sides, pairs, inputs, extent.tolerance, 4 * inputs[0].nbytes // 3)


def forms_case(extent: Extent, tokens: int, gradients: bool = False, heads: int = HEADS) -> Case:
    """Our kernels in each form of `ops.linear_attention.tiling`, against the one of fewest launches; it says what the
    constants there should be. With `gradients` the forward has its usual form."""
    inputs = rotation(extent, tokens, heads)
    tilings = tiling.forms(cores.split(inputs[0], heads)[0])
    run, plain = form, partial(cores.naive_linear, heads=heads)
    if gradients:
        run, plain = form_gradient, gradient(plain)
    truth = plain(inputs[0])
    names = [name for name in tilings if gradients or "half" not in name]
    calls = {name: replayed(partial(run, heads=heads, cut=tilings[name]), inputs) for name in names}
    pairs = [Pair(SAME, names[0], name) for name in names[1:]]
    name = core_name("forward and backward" if gradients else "forward", extent, tokens, heads)
    return Case(f"forms of {name}", {n: Side(c, truth) for n, c in calls.items()}, pairs, inputs, extent.tolerance)


def form(qkv: Tensor, heads: int, cut: tiling.Tiling) -> Tensor:
    """Linear attention of (B, N, 3 C) in one form: (B, N, C)."""
    q, k, v = cores.split(qkv, heads)
    out = q.new_empty(q.shape)
    launch.forward_into(out, q, k, v, None, EPS, cut=cut)
    return out.flatten(2)


def form_gradient(qkv: Tensor, heads: int, cut: tiling.Tiling) -> Tensor:
    """The gradient that `gradient` gives, by the backward in one form."""
    q, k, v = cores.split(qkv, heads)
    state = launch.forward_into(q.new_empty(q.shape), q, k, v, None, EPS)
    grads = torch.empty_like(qkv)
    dq, dk, dv = cores.split(grads, heads)
    weights = torch.linspace(-1, 1, q.shape[1], device=q.device, dtype=q.dtype)[None, :, None, None].expand_as(q)
    launch.backward_into((dq, dk, dv), weights, q, k, v, None, state, EPS, cut=cut)
    return grads


def backward(extent: Extent) -> list[Build]:
    if extent.quick:
        return []
    cases = [partial(backward_case, extent, tokens) for tokens in (1024, 4096)]
    return [*cases, *(partial(forms_case, extent, tokens, True) for tokens in (1024, 4096))]


def backward_case(extent: Extent, tokens: int, heads: int = HEADS) -> Case:
    """Forward and backward; the compared output is the gradient of the fused projection."""
    inputs = rotation(extent, tokens, heads)
    truth = gradient(partial(cores.naive_linear, heads=heads))(inputs[0])
    runs = {
        "diffusers": partial(cores.diffusers, heads=heads),
        "ours in torch": partial(cores.ours, heads=heads, backend="torch"),
        "ours": partial(cores.ours, heads=heads),
    }
    if extent.device.type == "cuda":
        config = nvlabs_algorithm.fastest(inputs[0], heads, gradients=True)
        runs["NVlabs' algorithm"] = partial(nvlabs_algorithm.core, heads=heads, config=config)
    sides = {name: Side(gradient(run), truth) for name, run in runs.items()}
    pairs = [Pair(SAME, name, "ours") for name in runs if name != "ours"]
    return Case(core_name("forward and backward", extent, tokens, heads), sides, pairs, inputs, extent.tolerance)


def rotation(extent: Extent, tokens: int, heads: int) -> list[Tensor]:
    return rotated(extent, (BATCH, tokens, 3 * heads * WIDTH))


def core_name(what: str, extent: Extent, tokens: int, heads: int) -> str:
    dtype = str(extent.dtype).removeprefix("torch.")
    return f"attention core {what}, {tokens} tokens, {BATCH} x {heads} heads of {WIDTH}, {dtype}"


def replayed(run: Run, inputs: list[Tensor]) -> Run:
    """The call as a CUDA graph per input, captured at first use; on the CPU the call itself."""
    if inputs[0].device.type != "cuda":
        return run
    graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def call(x: Tensor) -> Tensor:
        if x.data_ptr() not in graphs:
            graphs[x.data_ptr()] = captured(partial(run, x))
        graph, out = graphs[x.data_ptr()]
        graph.replay()
        return out

    return call


def captured(call: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of the call, warmed up on a side stream, and its output tensor."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


def gradient(run: Run) -> Run:
    """The gradient of a weighted sum of outputs; the same weights for every run."""

    def call(qkv: Tensor) -> Tensor:
        with torch.enable_grad():
            x = qkv.detach().requires_grad_()
            out = run(x)
        weights = torch.linspace(-1, 1, out.shape[1], device=x.device, dtype=out.dtype)[None, :, None]
        return torch.autograd.grad(out, x, weights.expand_as(out))[0]

    return call


# Operations between the matrix products of a block


def between(extent: Extent) -> list[Build]:
    """At SANA-0.6B's widths; buffers exceed the cache."""
    if extent.quick:
        return [partial(mix_ffn_case, extent, 8, 64), partial(modulate_case, extent, 8, 64)]
    return [
        partial(*case)
        for side in (32, 64)
        for case in ((mix_ffn_case, extent, side, 5 * 1152), (modulate_case, extent, side, 1152))
    ]


def mix_ffn_case(extent: Extent, side: int, channels: int) -> Case:
    """SiLU, 3x3 depthwise, gate: separate operators, as in diffusers, against one kernel."""
    weight, bias = (torch.randn(s, device=extent.device).to(extent.dtype) / 3 for s in ((channels, 1, 3, 3), channels))
    inputs = grids(extent, side, channels)
    truth = mix_ffn(inputs[0].double(), weight.double(), bias.double(), backend="torch")
    eager = partial(mix_ffn, weight=weight, bias=bias, backend="torch")
    kernel = partial(mix_ffn, weight=weight, bias=bias)
    name = f"Mix-FFN between its products, {side} x {side} tokens, batch {BATCH}, {channels} channels"
    return either(extent, name, eager, kernel, inputs, truth, 3 * inputs[0].nbytes // 2)


def modulate_case(extent: Extent, side: int, channels: int) -> Case:
    """Gated residual, LayerNorm, modulation; both results are compared."""
    vectors = [torch.randn(BATCH, channels, device=extent.device).to(extent.dtype) for _ in range(3)]
    inputs = grids(extent, side, channels)

    def run(x: Tensor, backend: Backend, wide: bool = False) -> Tensor:
        arguments = [t.double() if wide else t for t in (x, x.flip(1), *vectors)]
        return torch.stack(add_modulate(*arguments, backend=backend))

    truth = run(inputs[0], "torch", wide=True)
    eager, kernel = partial(run, backend="torch"), partial(run, backend="auto")
    name = f"residual, gate, LayerNorm, modulation (and a copy), {side} x {side} tokens, batch {BATCH}, {channels} wide"
    return either(extent, name, eager, kernel, inputs, truth, 0)


def grids(extent: Extent, side: int, channels: int) -> list[Tensor]:
    """Tokens (B, h, w, C) in rotation."""
    return rotated(extent, (BATCH, side, side, channels))


def rotated(extent: Extent, shape: tuple[int, ...]) -> list[Tensor]:
    """Random tensors of a shape, more than the cache holds."""
    torch.manual_seed(0)
    count = max(3, ROTATED // (2 * math.prod(shape)) + 1) if extent.device.type == "cuda" else 3
    return [torch.randn(shape, device=extent.device).to(extent.dtype) for _ in range(count)]


def either(
    extent: Extent, name: str, eager: Run, kernel: Run, inputs: list[Tensor], truth: Tensor, least_bytes: int
) -> Case:
    """Separate operators, compiled operators, and the kernel; all replayed from graphs."""
    runs = {"eager": eager, "ours": kernel}
    if extent.compiled:
        runs["compiled"] = torch.compile(eager, mode=MODE, dynamic=False)
    sides = {side: Side(replayed(run, inputs), truth) for side, run in runs.items()}
    pairs = [Pair(SAME, side, "ours") for side in runs if side != "ours"]
    return Case(
        f"{name}, {str(extent.dtype).removeprefix('torch.')}", sides, pairs, inputs, extent.tolerance, least_bytes
    )


# Products of fewer bits


def products(extent: Extent) -> list[Build]:
    """At 1024 px and, of the smaller transformer, at 4096 px."""
    at = (("0.6B", 4),) if extent.quick else (("1.6B", 32), ("0.6B", 32), ("0.6B", 128))
    return [partial(products_case, extent, *each) for each in at]


@torch.no_grad()
def products_case(extent: Extent, size: str, side: int) -> Case:
    """A block's four large products of `sampling.quantize=fp8`, the rounding of their inputs included, against those of
    the network's dtype. Inputs are random, and outputs of all four are compared. On the CPU rounding is simulated."""
    dit = models.ours_of(models.transformer(SIZES[size], 1)).to(extent.device, extent.dtype)
    mode = "fp8" if extent.device.type == "cuda" else "fp8_simulated"
    names, low = layers(dit, mode), quantized(dit, mode)
    plain, rounded = ([part.get_submodule(name) for name in names] for part in (dit, low))
    widths = [layer.in_features for layer in plain]
    inputs = rotated(extent, (BATCH * side * side * sum(widths),))

    def run(x: Tensor, parts: Sequence[torch.nn.Module], joined: bool = False) -> Tensor:
        flat = x.split([BATCH * side * side * width for width in widths])
        rows = [x.view(BATCH, side, side, width) for x, width in zip(flat, widths, strict=True)]
        outputs = [part(x) for part, x in zip(parts, rows, strict=True)]
        return torch.cat([y.flatten() for y in outputs]) if joined else outputs[-1]

    truth = run(inputs[0].double(), [copy.deepcopy(layer).double() for layer in plain], joined=True)
    exact = str(extent.dtype).removeprefix("torch.")
    sides = {
        name: Side(replayed(partial(run, parts=parts), inputs), truth, partial(run, parts=parts, joined=True))
        for name, parts in ((exact, plain), (mode, rounded))
    }
    name = f"{size} block, {len(names)} large products, {side} x {side} tokens, batch {BATCH}"
    return Case(name, sides, [Pair(OTHER, exact, mode)], inputs, DEEP)


# The transformer


def step(extent: Extent) -> list[Build]:
    if extent.quick:
        return [partial(step_case, extent, "0.6B", 16, 2)]
    return [partial(step_case, extent, *at) for at in (("0.6B", 32), ("1.6B", 32), ("0.6B", 16))]


def compiled(extent: Extent) -> list[Build]:
    """The steps again, against diffusers' compiled blocks, which take the longest to prepare."""
    at = (("0.6B", 16, 2),) if extent.quick else (("1.6B", 32, None), ("0.6B", 32, None))
    return [partial(step_case, extent, *each, compiling=True) for each in at] if extent.compiled else []


def large(extent: Extent) -> list[Build]:
    """Steps of 2048 and 4096 px; decodes of 4096 px in tiles, against larger tiles and whole."""
    if extent.quick:
        return [partial(tiles_case, extent, 128, 1, 2, 4)]
    steps = [partial(step_case, extent, "0.6B", side) for side in (64, 128)]
    return [*steps, *(partial(tiles_case, extent, 4096, 3, 32, other) for other in (64, 128))]


@torch.no_grad()
def step_case(extent: Extent, size: str, side: int, blocks: int | None = None, compiling: bool = False) -> Case:
    """A guided step (batch 2); diffusers projects the padded captions in every step. Ours as in sampling is the
    production path: padded to a bucket with a mask where it is replayed."""
    theirs, ours = pair(extent, size, blocks)
    text = models.captions(TOKENS, PADDED, extent.device)
    inputs = [torch.randn(2, 32, side, side, device=extent.device) for _ in range(3)]
    truth = models.peer_step(theirs, inputs[0], *text)
    theirs, ours = theirs.to(extent.dtype), ours.to(extent.dtype)
    text, inputs = Text(text.tokens.to(extent.dtype), text.mask), [x.to(extent.dtype) for x in inputs]
    half = torch.full((2,), 0.5)  # on the host, as in sampling
    t, model = half.to(inputs[0]), models.prepared(ours, text, half)
    bound = Graphs().velocity("always" if extent.device.type == "cuda" else "never", model)
    peer = lambda x: models.peer_step(theirs, x, *text)  # noqa: E731
    sides = {
        "diffusers": Side(peer, truth),
        "diffusers, graph": Side(replayed(peer, inputs), truth),
        "ours": Side(lambda x: ours(x, t, text), truth),
        "ours, prepared": Side(lambda x: model(x, half), truth),
        "ours, prepared, graph": Side(lambda x: bound(x, half), truth),
    }
    pairs = [
        Pair(SAME, "diffusers", "ours"),
        Pair(EXACT, "diffusers", "ours, prepared"),
        Pair(EXACT, "diffusers, graph", "ours, prepared, graph"),
    ]
    if compiling:
        faster = models.compiled_peer(theirs, MODE)
        sides["diffusers, compiled, graph"] = Side(
            replayed(lambda x: models.peer_step(faster, x, *text), inputs), truth
        )
        pairs = [Pair(EXACT, "diffusers, compiled, graph", "ours, prepared, graph")]
    tolerance = DEEP if extent.dtype != torch.float32 else extent.tolerance
    name = f"{size} step, {len(ours.blocks)} blocks, batch 2, {32 * side} px, {TOKENS} and 1 of {PADDED} caption tokens"
    return Case(name, sides, pairs, inputs, tolerance)


def pair(extent: Extent, size: str, blocks: int | None) -> tuple[Any, Any]:
    """diffusers' transformer and ours in float32, without shared memory."""
    theirs = models.transformer(SIZES[size], blocks).to(extent.device)
    return theirs, models.ours_of(theirs).to(extent.device)


def denoise(extent: Extent) -> list[Build]:
    return [partial(denoise_case, extent, "1.6B", 8 if extent.quick else 32, 2 if extent.quick else None)]


@torch.no_grad()
def denoise_case(extent: Extent, size: str, side: int, blocks: int | None) -> Case:
    """Twenty guided steps of Flow-DPM-Solver, captions and padding as in `step`. Outputs are compared after one step,
    because twenty half-precision steps with random weights diverge."""
    theirs, ours = (part.to(extent.dtype) for part in pair(extent, size, blocks))
    text = models.captions(TOKENS, PADDED, extent.device)
    text = Text(text.tokens.to(extent.dtype), text.mask)
    prompt, null = Text(text.tokens[:1, :TOKENS], text.mask[:1, :TOKENS]), Text(text.tokens[1:, :1], text.mask[1:, :1])
    flow, graphs = models.FLOW, Graphs()
    inputs = [torch.randn(1, 32, side, side, device=extent.device) for _ in range(3)]
    bind = partial(graphs.velocity, "always" if extent.device.type == "cuda" else "never")
    graphed = models.Graphed(theirs, captured)

    def mine(noise: Tensor, steps: int = STEPS) -> Tensor:
        how = Sampling(steps=steps)
        return how.run(guided(ours, prompt, null, how.guidance, times=how.network_times(flow), bind=bind), noise, flow)

    def peer(noise: Tensor, model: Any, steps: int = STEPS) -> Tensor:
        how = Sampling(steps=steps)
        return how.run(models.peer_velocity(model, prompt, null, PADDED, how.guidance), noise, flow)

    truth = peer(inputs[0], theirs, 1)
    sides = {
        "ours": Side(mine, truth, partial(mine, steps=1)),
        "diffusers": Side(partial(peer, model=theirs), truth, partial(peer, model=theirs, steps=1)),
        "diffusers, graph": Side(partial(peer, model=graphed), truth, partial(peer, model=graphed, steps=1)),
    }
    name = f"{size}, {STEPS} guided steps, {32 * side} px, {len(ours.blocks)} blocks, {TOKENS} caption tokens"
    pairs = [Pair(EXACT, "diffusers", "ours"), Pair(EXACT, "diffusers, graph", "ours")]
    return Case(name, sides, pairs, inputs, DEEP, repeats=5)


# The decoder and the whole pipeline


def decode(extent: Extent) -> list[Build]:
    if extent.quick:
        return [partial(decode_case, extent, 64, 1), partial(upsample_case, extent, 6, 8, 4, "channels_last")]
    stages = ((64, 1024, 512), (256, 512, 256), (512, 256, 128))  # of 1024 px
    upsamples = [partial(upsample_case, extent, *stage, "channels_last") for stage in stages]
    return [
        partial(decode_case, extent, 1024, 3),
        *upsamples,
        partial(upsample_case, extent, *stages[-1], "contiguous_format"),
    ]


@torch.no_grad()
def decode_case(extent: Extent, size: int, blocks: int) -> Case:
    """DC-AE f32c32's decoder, batch 1."""
    theirs = models.autoencoder(blocks).to(extent.device)
    inputs = [torch.randn(1, 32, size // 32, size // 32, device=extent.device) for _ in range(3)]
    truth = theirs.decode(inputs[0], return_dict=False)[0]
    ours = models.ours_of(models.autoencoder(blocks)).to(extent.device, extent.dtype)
    theirs, inputs = theirs.to(extent.dtype), [z.to(extent.dtype) for z in inputs]
    sides = {
        "diffusers": Side(lambda z: theirs.decode(z, return_dict=False)[0], truth),
        "ours": Side(ours.reconstruct, truth),
    }
    if extent.compiled:
        last = models.channels_last(models.autoencoder(blocks).to(extent.device, extent.dtype))
        compiled = torch.compile(last.decoder, mode=MODE, dynamic=False)
        sides["diffusers, channels last, compiled"] = Side(compiled, truth)
    pairs = [Pair(EXACT, name, "ours") for name in sides if name != "ours"]
    return Case(f"DC-AE f32c32 decode, {size} px", sides, pairs, inputs, 2 * extent.tolerance, repeats=11)


@torch.no_grad()
def upsample_case(extent: Extent, side: int, channels: int, out: int, memory: str) -> Case:
    """The decoder's upsampling: nearest neighbours and a 3x3 convolution, against one folded transposed convolution,
    whose kernel is folded at each call; in a memory format of torch."""
    conv = torch.nn.Conv2d(channels, out, 3).to(extent.device, extent.dtype).requires_grad_(False)
    inputs = [x.contiguous(memory_format=getattr(torch, memory)) for x in rotated(extent, (1, channels, side, side))]
    wide = [t.double() for t in (inputs[0], conv.weight, conv.bias)]
    truth = upsample_conv3x3(*wide, backend="torch")

    def run(x: Tensor, backend: Fast) -> Tensor:
        return upsample_conv3x3(x, conv.weight, conv.bias, backend)

    backends: dict[str, Fast] = {"separate": "torch", "folded": "fast"}
    sides = {name: Side(replayed(partial(run, backend=each), inputs), truth) for name, each in backends.items()}
    name = f"upsampling of the decoder, {side} x {side}, {channels} to {out} channels, {memory.replace('_', ' ')}"
    return Case(name, sides, [Pair(EXACT, "separate", "folded")], inputs, extent.tolerance)


@torch.no_grad()
def tiles_case(extent: Extent, size: int, blocks: int, tile: int, other: int) -> Case:
    """DC-AE f32c32's decoder in tiles of `tile` and of `other` latents on a side, which may be the whole grid; both
    against smaller tiles in float32."""
    side = size // 32
    ours = models.ours_of(models.autoencoder(blocks)).to(extent.device).eval()
    inputs = [torch.randn(1, 32, side, side, device=extent.device) for _ in range(3)]

    def run(z: Tensor, tile: int) -> Tensor:
        ours.tile = tile
        return ours.reconstruct(z)

    truth = run(inputs[0], max(1, tile // 2))
    ours, inputs = ours.to(extent.dtype), [z.to(extent.dtype) for z in inputs]
    names = {n: "whole" if n >= side else f"tiles of {n} x {n} latents" for n in (tile, other)}
    sides = {names[n]: Side(partial(run, tile=n), truth) for n in names}
    pairs = [Pair(SAME, names[other], names[tile])]
    return Case(f"DC-AE f32c32 decode in tiles, {size} px", sides, pairs, inputs, 2 * extent.tolerance, repeats=3)


def whole(extent: Extent) -> list[Build]:
    return [partial(whole_case, extent, *((64, 1, 1, 1) if extent.quick else (1024, 26, 28, 3)))]


@torch.no_grad()
def whole_case(extent: Extent, size: int, layers: int, blocks: int, stage: int) -> Case:
    """Prompt to image, 20 guided steps, warm. Images are compared after one step, because twenty half-precision steps
    with random weights diverge."""
    steps = 2 if extent.quick else STEPS
    theirs = models.pipeline(layers, blocks, stage).to(dtype=extent.dtype)
    ours = models.system_of(theirs).to(extent.device)
    theirs = theirs.to(extent.device)
    theirs.set_progress_bar_config(disable=True)
    settings = {**ours.experiment["sampling"], "guidance": 4.5}

    def ours_image(i: int, steps: int = steps) -> Tensor:
        how = Sampling(**{**settings, "steps": steps})
        return ours.sample([models.prompt(i)], size=size, sampling=how, seed=i)

    def peer_image(i: int, steps: int = steps) -> Tensor:
        noise = noise_like((32, size // 32, size // 32), i, [0]).to(extent.device)
        options = {"num_inference_steps": steps, "guidance_scale": 4.5, "height": size, "width": size}
        result = theirs([models.prompt(i)], latents=noise, use_resolution_binning=False, output_type="pt", **options)
        return result.images.mul(255).round()

    truth = peer_image(0, 1)
    sides = {
        "ours": Side(fresh(ours_image), truth, lambda _: ours_image(0, 1)),
        "diffusers": Side(fresh(peer_image), truth, lambda _: peer_image(0, 1)),
    }
    tolerance = DEEP if extent.dtype != torch.float32 else 1e-2
    name = f"whole pipeline, SANA-0.6B, {size} px, {steps} steps, guidance"
    return Case(name, sides, [Pair(EXACT, "diffusers", "ours")], [None], tolerance, repeats=5)


# A replayed step, kernel by kernel


def profile(extent: Extent) -> list[Build]:
    return [partial(kernels_of_a_step, extent, "1.6B", 8 if extent.quick else 32, 2 if extent.quick else None)]  # type: ignore[list-item]


@torch.no_grad()
def kernels_of_a_step(extent: Extent, size: str, side: int, blocks: int | None) -> Json:
    """Milliseconds by kernel in one replayed guided step, the longest first."""
    ours = pair(extent, size, blocks)[1].to(extent.dtype)
    text = models.captions(TOKENS, PADDED, extent.device)
    half = torch.full((2,), 0.5)
    model = models.prepared(ours, Text(text.tokens.to(extent.dtype), text.mask), half)
    bound = Graphs().velocity("always" if extent.device.type == "cuda" else "never", model)
    x = torch.randn(2, 32, side, side, device=extent.device, dtype=extent.dtype)
    bound(x, half)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if extent.device.type == "cuda":
        activities += [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as trace:
        bound(x, half)
        if extent.device.type == "cuda":
            torch.cuda.synchronize()
    rows = [(e.key[:80], (getattr(e, "self_device_time_total", 0) or 0) / 1e3, e.count) for e in trace.key_averages()]
    longest = sorted(rows, key=lambda row: -row[1])[:15]
    return {"kernels": [{"name": name, "ms": ms, "count": count} for name, ms, count in longest if ms]}


SECTIONS: dict[str, Callable[[Extent], list[Build]]] = {
    "card": card,
    "forward": forward,
    "backward": backward,
    "between": between,
    "products": products,
    "step": step,
    "denoise": denoise,
    "decode": decode,
    "whole": whole,
    "compiled": compiled,
    "large": large,
    "profile": profile,
}

FOLDER = Path(__file__).resolve().parent
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default"]
TESTS = FOLDER.parent / "tests"
KERNELS = [str(path) for path in sorted((TESTS / "ops").glob("*/cases_*.py"))]
COMMANDS: dict[str, list[str]] = {
    "kernels": [*PYTEST, "-n", "12", *KERNELS, "-k", "at_size or cuda_graph or repeats"],
    "paths": [*PYTEST, "-m", "gpu", str(TESTS / "systems"), str(TESTS / "profiler")],
}
"""Sections that are commands: the kernels against float64 at SANA's shapes; graphs, offload, optimisers, host syncs."""

PLANS: dict[str, list[Section]] = {
    "first": [
        Section("card", 20),
        Section("kernels", 70),
        Section("denoise", 75),
        Section("profile", 25),
        Section("paths", 50),
    ],
    "second": [
        Section("step", 80, 60),
        Section("forward", 60, 40),
        Section("between", 30, 20),
        Section("products", 20, 10),
        Section("decode", 55, 40),
        Section("whole", 45),
        Section("backward", 35, 30),
        Section("compiled", 100, 60),
        Section("large", 55, 25),
    ],
}
PLANS["all"] = [*PLANS["first"], *PLANS["second"]]


if __name__ == "__main__":
    sys.exit(main())
