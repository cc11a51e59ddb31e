"""Side by side on one CUDA device, in under ten minutes: python benchmarks/gpu.py [--quick] [--skip-compile]

The card's copy bandwidth and matrix product first, so that later numbers are shares of what it can do. Then linear
attention (ours by backend, diffusers' processor eager and compiled, fused softmax), forward and with backward; then a
SANA-0.6B step against diffusers.
"""

import argparse
import sys
from collections.abc import Iterator
from functools import partial

import torch
from common import (
    OTHER,
    SAME,
    Case,
    Protocol,
    Run,
    Step,
    diffusers_core,
    environment,
    naive_linear,
    naive_softmax,
    run_case,
    save,
    split,
    table,
)
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sana_lab.evaluation.efficiency import measure
from sana_lab.ops.linear_attention import linear_attention
from sana_lab.types import Json

BATCH, HEADS, WIDTH = 2, 36, 32  # SANA-0.6B under guidance
ROTATED = 200 * 2**20  # bytes of inputs in rotation: more than three times the L2 of an H200
TOLERANCE = 2e-2  # of bfloat16 against float64; what rounding alone gives is printed beside


def main() -> int:
    options = arguments()
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was measured (benchmarks/cpu.py runs anywhere)")
        return 0
    device = torch.device("cuda")
    protocol = Protocol(device, warmup=5, repeats=5 if options.quick else 21, stretch_s=2e-3)
    print(environment(device))
    limits = card(device)
    records = [with_share(run_case(case, protocol), case, limits) for case in cases(options, device)]
    print("\n" + table(records))
    settings = {"warmup": protocol.warmup, "repeats": protocol.repeats, "clock": "CUDA events", **vars(options)}
    if not options.quick:
        print(f"\nwritten to {save('gpu', settings, records, device, {'card': limits})}")
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="few shapes and repeats, to see that it runs; nothing is written"
    )
    parser.add_argument("--skip-compile", action="store_true", help="leave out torch.compile of the peer")
    return parser.parse_args()


def card(device: torch.device) -> Json:
    """What the card reaches as found: bytes read and written per second, and bfloat16 FLOP/s of an 8192^3 product."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(2**28, device=device)
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source), 3, 11, device).typical_s
    product = measure(lambda: a @ b, 3, 11, device).typical_s
    found = {"copy_tb_s": 2 * source.nbytes / copy / 1e12, "matmul_tflop_s": 2 * 8192**3 / product / 1e12}
    print(f"copy {found['copy_tb_s']:.2f} TB/s, matmul {found['matmul_tflop_s']:.0f} TFLOP/s")
    return found


def cases(options: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    for tokens in (256, 1024) if options.quick else (256, 1024, 4096, 16384):
        yield from forward_cases(tokens, device, not options.skip_compile)
    for tokens in () if options.quick else (1024, 4096):
        yield from backward_cases(tokens, device)
    for side in (16,) if options.quick else (16, 32):
        step = Step(2 if options.quick else 28, side, torch.bfloat16, device, tolerance=0.1)
        yield from step.cases()
        if not options.skip_compile:
            yield from step.cases(partial(torch.compile, mode="max-autotune-no-cudagraphs"), " compiled")


def forward_cases(tokens: int, device: torch.device, compiled: bool) -> Iterator[Case]:
    """Cores on a fused projection in bfloat16; buffers in rotation exceed the cache."""
    inputs = rotation(tokens, device)
    truth, other = naive_linear(inputs[0], HEADS), naive_softmax(inputs[0], HEADS)
    peers: list[tuple[str, str, Run, Tensor]] = [
        (SAME, "diffusers eager", theirs, truth),
        (SAME, "ours in torch", partial(ours, backend="torch"), truth),
        (OTHER, "softmax (fused)", softmax, other),
    ]
    if compiled:
        peers.insert(1, (SAME, "diffusers compiled", torch.compile(theirs, mode="max-autotune-no-cudagraphs"), truth))
    for tier, name, run, expected in peers:
        case = Case(
            title("forward", tokens), tier, name, "ours in triton", run, ours, inputs, expected, truth, TOLERANCE
        )
        yield case._replace(least_bytes=4 * inputs[0].nbytes // 3)


def backward_cases(tokens: int, device: torch.device) -> Iterator[Case]:
    """Forward and backward: what is compared is the gradient of the fused projection."""
    inputs = rotation(tokens, device)
    truth = gradient(partial(naive_linear, heads=HEADS))(inputs[0])
    name = title("forward and backward", tokens)
    for peer, run in (("diffusers eager", theirs), ("ours in torch", partial(ours, backend="torch"))):
        pair = gradient(run), gradient(ours)
        yield Case(name, SAME, peer, "ours in triton", *pair, inputs, truth, truth, TOLERANCE)


def rotation(tokens: int, device: torch.device) -> list[Tensor]:
    torch.manual_seed(0)
    size = BATCH * tokens * 3 * HEADS * WIDTH
    count = max(3, ROTATED // (2 * size) + 1)
    return [torch.randn(BATCH, tokens, 3 * HEADS * WIDTH, device=device).bfloat16() for _ in range(count)]


def title(what: str, tokens: int) -> str:
    return f"attention core {what}, {tokens} tokens, {BATCH} x {HEADS} heads of {WIDTH}, bfloat16"


def ours(qkv: Tensor, backend: str = "triton") -> Tensor:
    return linear_attention(*split(qkv, HEADS), backend=backend).flatten(2)


def theirs(qkv: Tensor) -> Tensor:
    return diffusers_core(qkv, HEADS)


def softmax(qkv: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in split(qkv, HEADS))
    return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def gradient(run: Run) -> Run:
    """The gradient of a weighted sum of outputs; the same weights for every run."""

    def call(qkv: Tensor) -> Tensor:
        with torch.enable_grad():
            x = qkv.detach().requires_grad_()
            out = run(x)
        weights = torch.linspace(-1, 1, out.shape[1], device=x.device, dtype=out.dtype)[None, :, None]
        return torch.autograd.grad(out, x, weights.expand_as(out))[0]

    return call


def with_share(record: Json, case: Case, limits: Json) -> Json:
    """The record, and what share of the card's copy bandwidth ours reached, where that is the limit."""
    if not case.least_bytes or "times" not in record:
        return record
    rate = case.least_bytes / record["times"]["ours"]["device_s"] / 1e12
    print(f"  {case.ours_name} moves at least {rate:.2f} TB/s, {rate / limits['copy_tb_s']:.0%} of a copy")
    return {**record, "ours_share_of_copy": rate / limits["copy_tb_s"]}


if __name__ == "__main__":
    sys.exit(main())
