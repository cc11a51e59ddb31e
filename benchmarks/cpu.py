"""Side by side on the CPU, in under ten minutes: python benchmarks/cpu.py [--threads N] [--clock wall|thread] [--quick]

Attention: softmax against linear, and ours against diffusers' processor; then a SANA-0.6B step against diffusers.
"""

import argparse
from collections.abc import Iterable, Iterator

import torch
from common import (
    OTHER,
    SAME,
    Case,
    Protocol,
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

from sana_lab.attention.linear import LinearAttention
from sana_lab.attention.softmax import SoftmaxAttention
from sana_lab.evaluation.efficiency import thread_clock

HEADS, WIDTH = 9, 32  # a quarter of SANA-0.6B's 36 heads


def main() -> None:
    options = arguments()
    torch.set_num_threads(1 if options.clock == "thread" else options.threads)
    clock = thread_clock if options.clock == "thread" else None
    device = torch.device("cpu")
    protocol = Protocol(device, warmup=3, repeats=3 if options.quick else 9, clock=clock)
    print(environment(device))
    records = [run_case(case, protocol) for case in cases(options.quick)]
    print("\n" + table(records))
    settings = {"clock": options.clock, "warmup": protocol.warmup, "repeats": protocol.repeats}
    if not options.quick:
        print(f"\nwritten to {save('cpu', settings, records, device)}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument(
        "--clock", choices=["wall", "thread"], default="wall", help="thread: one thread, its processor time"
    )
    parser.add_argument(
        "--quick", action="store_true", help="small shapes and few repeats, to see that it runs; nothing is written"
    )
    return parser.parse_args()


def cases(quick: bool) -> Iterator[Case]:
    for tokens in (64, 256) if quick else (64, 256, 1024, 4096):
        yield from attention_cases(tokens)
    for side in (8,) if quick else (16, 32):
        yield from Step(2, side, torch.float32, torch.device("cpu"), tolerance=1e-4).cases()


def attention_cases(tokens: int) -> Iterable[Case]:
    """Cores on a fused projection, without projections: only the mixing differs."""
    torch.manual_seed(0)
    inputs = [torch.randn(1, tokens, 3 * HEADS * WIDTH) for _ in range(3)]
    softmax, linear = SoftmaxAttention(dim=HEADS * WIDTH), LinearAttention(dim=HEADS * WIDTH)
    by_softmax, by_linear = naive_softmax(inputs[0], HEADS), naive_linear(inputs[0], HEADS)
    name = f"attention core, {tokens} tokens, {HEADS} heads of {WIDTH}, float32"

    def ours(qkv: Tensor) -> Tensor:
        return linear.mix(*split(qkv, HEADS)).flatten(2)

    def fused(qkv: Tensor) -> Tensor:
        return softmax.mix(*split(qkv, HEADS)).flatten(2)

    def theirs(qkv: Tensor) -> Tensor:
        return diffusers_core(qkv, HEADS)

    yield Case(name, OTHER, "softmax (fused)", "linear", fused, ours, inputs, by_softmax, by_linear)
    yield Case(name, SAME, "diffusers linear", "linear", theirs, ours, inputs, by_linear, by_linear)


if __name__ == "__main__":
    main()
