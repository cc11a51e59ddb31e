"""Side by side on one CUDA device, in under ten minutes: python benchmarks/gpu.py [--only SECTION ...] [--quick]

First the GPU's copy bandwidth and matrix-product throughput, as references for later numbers. Then cores of linear
attention, SANA's transformer, DC-AE's decoder and a whole pipeline, against diffusers, eager and compiled, with the
same random weights.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import cores
import models
import nvlabs_algorithm
import torch
from common import EXACT, OTHER, SAME, Case, Pair, Protocol, Run, Side, environment, fresh, run_case, save, table
from models import SIZES
from torch import Tensor

from sana_lab.costs.timing import interleave
from sana_lab.diffusion.guidance import guided
from sana_lab.diffusion.sampling import Sampling, noise_like
from sana_lab.ops.backend import Backend
from sana_lab.ops.mix_ffn import mix_ffn
from sana_lab.ops.modulate import add_modulate
from sana_lab.systems.cuda_graphs import Graphs
from sana_lab.types import Json, Text

BATCH, HEADS, WIDTH = 2, 36, 32  # SANA-0.6B under guidance
ROTATED = 200 * 2**20  # bytes of inputs in rotation: more than three times the L2 of an H200
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}  # against float64; the rounding error is printed beside
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


def main() -> int:
    options = arguments()
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was measured (benchmarks/cpu.py runs anywhere)")
        return 0
    device = torch.device("cuda")
    protocol = Protocol(device, warmup=3, repeats=5 if options.quick else 21, stretch_s=2e-3)
    print(environment(device))
    limits = card(device)
    records = []
    for name in options.only or SECTIONS:
        for case in SECTIONS[name](Extent(device, options.quick, not options.skip_compile)):
            records += with_share(run_case(case, protocol), case, limits)
            torch.cuda.empty_cache()
    print("\n" + table(records))
    settings = {"warmup": protocol.warmup, "repeats": protocol.repeats, "clock": "CUDA events", **vars(options)}
    if not options.quick:
        print(f"\nwritten to {save('gpu', settings, records, device, {'card': limits})}")
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="these sections alone")
    parser.add_argument(
        "--quick", action="store_true", help="few shapes and repeats, to see that it runs; nothing is written"
    )
    parser.add_argument("--skip-compile", action="store_true", help="leave out torch.compile of the peer")
    return parser.parse_args()


def card(device: torch.device) -> Json:
    """Reference throughput of the GPU: TB/s of a copy (read and write) and bfloat16 TFLOP/s of an 8192^3 product."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(2**28, device=device)
    target = torch.empty_like(source)
    times = interleave({"copy": lambda: target.copy_(source), "product": lambda: a @ b}, 3, 11, device)
    copy, product = times["copy"].typical_s, times["product"].typical_s
    limits = {"copy_tb_s": 2 * source.nbytes / copy / 1e12, "matmul_tflop_s": 2 * 8192**3 / product / 1e12}
    print(f"copy {limits['copy_tb_s']:.2f} TB/s, matmul {limits['matmul_tflop_s']:.0f} TFLOP/s")
    return limits


# Cores


def forward(extent: Extent) -> Iterator[Case]:
    for tokens in (256, 1024) if extent.quick else (256, 1024, 4096, 16384):
        yield forward_case(extent, tokens)


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
        runs["diffusers, compiled"] = (SAME, torch.compile(runs["diffusers"][1], mode=MODE), truth)
    if extent.device.type == "cuda":
        config = nvlabs_algorithm.fastest(inputs[0], heads)
        runs["NVlabs' algorithm"] = (SAME, partial(nvlabs_algorithm.core, heads=heads, config=config), truth)
    sides = {name: Side(replayed(run, inputs), true) for name, (_, run, true) in runs.items()}
    sides["ours"] = Side(replayed(partial(cores.ours, heads=heads), inputs), truth)
    pairs = [Pair(tier, name, "ours") for name, (tier, _, _) in runs.items()]
    name = core_name("forward", extent, tokens, heads)
    return Case(name, sides, pairs, inputs, extent.tolerance, 4 * inputs[0].nbytes // 3)


def backward(extent: Extent) -> Iterator[Case]:
    for tokens in () if extent.quick else (1024, 4096):
        yield backward_case(extent, tokens)


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
    torch.manual_seed(0)
    size = BATCH * tokens * 3 * heads * WIDTH
    count = max(3, ROTATED // (2 * size) + 1) if extent.device.type == "cuda" else 3
    shape = (BATCH, tokens, 3 * heads * WIDTH)
    return [torch.randn(shape, device=extent.device).to(extent.dtype) for _ in range(count)]


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


def between(extent: Extent) -> Iterator[Case]:
    """At SANA-0.6B's widths; buffers exceed the cache."""
    for side in (8,) if extent.quick else (32, 64):
        yield mix_ffn_case(extent, side, 64 if extent.quick else 5 * 1152)
        yield modulate_case(extent, side, 64 if extent.quick else 1152)


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
    torch.manual_seed(0)
    size = BATCH * side * side * channels
    count = max(3, ROTATED // (2 * size) + 1) if extent.device.type == "cuda" else 3
    shape = (BATCH, side, side, channels)
    return [torch.randn(shape, device=extent.device).to(extent.dtype) for _ in range(count)]


def either(
    extent: Extent, name: str, eager: Run, kernel: Run, inputs: list[Tensor], truth: Tensor, least_bytes: int
) -> Case:
    """Separate operators, compiled operators, and the kernel; all replayed from graphs."""
    runs = {"eager": eager, "ours": kernel}
    if extent.compiled:
        runs["compiled"] = torch.compile(eager, mode=MODE)
    sides = {side: Side(replayed(run, inputs), truth) for side, run in runs.items()}
    pairs = [Pair(SAME, side, "ours") for side in runs if side != "ours"]
    return Case(
        f"{name}, {str(extent.dtype).removeprefix('torch.')}", sides, pairs, inputs, extent.tolerance, least_bytes
    )


# The transformer


def step(extent: Extent) -> Iterator[Case]:
    for side in (16,) if extent.quick else (16, 32):
        yield step_case(extent, "0.6B", side, 2 if extent.quick else None)


@torch.no_grad()
def step_case(extent: Extent, size: str, side: int, blocks: int | None) -> Case:
    """A guided step (batch 2); diffusers projects the padded captions in every step."""
    theirs, ours = pair(extent, size, blocks)
    text = models.captions(TOKENS, PADDED, extent.device)
    inputs = [torch.randn(2, 32, side, side, device=extent.device) for _ in range(3)]
    truth = models.peer_step(theirs, inputs[0], *text)
    theirs, ours = theirs.to(extent.dtype), ours.to(extent.dtype)
    text, inputs = Text(text.tokens.to(extent.dtype), text.mask), [x.to(extent.dtype) for x in inputs]
    half = torch.full((2,), 0.5)  # on the host, as in sampling
    t, model = half.to(inputs[0]), models.prepared(ours, text, half)
    prepared = partial(lambda x: model(x, half))
    sides = {
        "diffusers": Side(lambda x: models.peer_step(theirs, x, *text), truth),
        "ours": Side(lambda x: ours(x, t, text), truth),
        "ours, prepared": Side(prepared, truth),
        "ours, prepared, graph": Side(replayed(prepared, inputs), truth),
    }
    pairs = [Pair(SAME if name == "ours" else EXACT, "diffusers", name) for name in sides if name != "diffusers"]
    if extent.compiled:
        compiled = models.compiled_peer(theirs, MODE)
        sides["diffusers, compiled"] = Side(lambda x: models.peer_step(compiled, x, *text), truth)
        pairs.append(Pair(EXACT, "diffusers, compiled", "ours, prepared, graph"))
    tolerance = DEEP if extent.dtype != torch.float32 else extent.tolerance
    name = f"{size} step, {len(ours.blocks)} blocks, batch 2, {32 * side} px, {TOKENS} and 1 of {PADDED} caption tokens"
    return Case(name, sides, pairs, inputs, tolerance)


def pair(extent: Extent, size: str, blocks: int | None) -> tuple[Any, Any]:
    """diffusers' transformer and ours in float32, without shared memory."""
    theirs = models.transformer(SIZES[size], blocks).to(extent.device)
    return theirs, models.ours_of(theirs).to(extent.device)


def denoise(extent: Extent) -> Iterator[Case]:
    yield denoise_case(extent, "1.6B", 8 if extent.quick else 32, 2 if extent.quick else None)


@torch.no_grad()
def denoise_case(extent: Extent, size: str, side: int, blocks: int | None) -> Case:
    """Twenty guided steps of Flow-DPM-Solver, captions and padding as in `step`. Outputs are compared after one step,
    because twenty half-precision steps with random weights diverge."""
    theirs, ours = (part.to(extent.dtype) for part in pair(extent, size, blocks))
    text = models.captions(TOKENS, PADDED, extent.device)
    text = Text(text.tokens.to(extent.dtype), text.mask)
    prompt, null = Text(text.tokens[:1, :TOKENS], text.mask[:1, :TOKENS]), Text(text.tokens[1:, :1], text.mask[1:, :1])
    how = Sampling(steps=STEPS)
    flow = models.FLOW
    inputs = [torch.randn(1, 32, side, side, device=extent.device) for _ in range(3)]

    graphs = Graphs()
    bind = partial(graphs.velocity, "always" if extent.device.type == "cuda" else "never")

    def mine(noise: Tensor) -> Tensor:
        return how.run(guided(ours, prompt, null, how.guidance, times=how.network_times(flow), bind=bind), noise, flow)

    def peer(noise: Tensor) -> Tensor:
        return how.run(models.peer_velocity(theirs, prompt, null, PADDED, how.guidance), noise, flow)

    sides = {"ours": Side(mine, peer(inputs[0])), "diffusers": Side(peer, peer(inputs[0]))}
    name = f"{size}, {STEPS} guided steps, {32 * side} px, {len(ours.blocks)} blocks, {TOKENS} caption tokens"
    return Case(name, sides, [Pair(EXACT, "diffusers", "ours")], inputs, 10 * DEEP, repeats=5)


# The decoder and the whole pipeline


def decode(extent: Extent) -> Iterator[Case]:
    yield decode_case(extent, 64 if extent.quick else 1024, 1 if extent.quick else 3)


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
        compiled = torch.compile(last.decoder, mode=MODE)
        sides["diffusers, channels last, compiled"] = Side(compiled, truth)
    pairs = [Pair(EXACT, name, "ours") for name in sides if name != "ours"]
    return Case(f"DC-AE f32c32 decode, {size} px", sides, pairs, inputs, 2 * extent.tolerance, repeats=11)


def whole(extent: Extent) -> Iterator[Case]:
    yield whole_case(extent, 64 if extent.quick else 1024, *((1, 1, 1) if extent.quick else (26, 28, 3)))


@torch.no_grad()
def whole_case(extent: Extent, size: int, layers: int, blocks: int, stage: int) -> Case:
    """Prompt to image, 20 guided steps, warm. Half-precision images of random weights diverge, so the comparison is
    loose here and exact in the CPU benchmark and the tests."""
    steps = 2 if extent.quick else STEPS
    theirs = models.pipeline(layers, blocks, stage).to(dtype=extent.dtype)
    ours = models.system_of(theirs).to(extent.device)
    theirs = theirs.to(extent.device)
    theirs.set_progress_bar_config(disable=True)
    how = Sampling(**{**ours.experiment["sampling"], "steps": steps, "guidance": 4.5})

    def ours_image(i: int) -> Tensor:
        return ours.sample([models.prompt(i)], size=size, sampling=how, seed=i)

    def peer_image(i: int) -> Tensor:
        noise = noise_like((32, size // 32, size // 32), i, [0]).to(extent.device)
        options = {"num_inference_steps": steps, "guidance_scale": 4.5, "height": size, "width": size}
        result = theirs([models.prompt(i)], latents=noise, use_resolution_binning=False, output_type="pt", **options)
        return result.images.mul(255).round()

    truth = peer_image(0)
    sides = {"ours": Side(fresh(ours_image), truth), "diffusers": Side(fresh(peer_image), truth)}
    tolerance = 0.5 if extent.dtype != torch.float32 else 1e-2
    name = f"whole pipeline, SANA-0.6B, {size} px, {steps} steps, guidance"
    return Case(name, sides, [Pair(EXACT, "diffusers", "ours")], [None], tolerance, repeats=5)


SECTIONS: dict[str, Callable[[Extent], Iterator[Case]]] = {
    "forward": forward,
    "backward": backward,
    "between": between,
    "step": step,
    "denoise": denoise,
    "decode": decode,
    "whole": whole,
}


def with_share(records: list[Json], case: Case, limits: Json) -> list[Json]:
    """Records with our share of the GPU's copy bandwidth, for bandwidth-bound cases."""
    if not case.least_bytes:
        return records
    return [r | share(r, case, limits) if "times" in r else r for r in records]


def share(record: Json, case: Case, limits: Json) -> Json:
    rate = case.least_bytes / record["times"]["ours"]["device_s"] / 1e12
    print(f"  ours moves at least {rate:.2f} TB/s, {rate / limits['copy_tb_s']:.0%} of a copy")
    return {"ours_share_of_copy": rate / limits["copy_tb_s"]}


if __name__ == "__main__":
    sys.exit(main())
