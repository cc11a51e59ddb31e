"""Tiling of linear attention: tokens and heads per Triton program, as functions of shape and dtype.

There is no run-time autotuning: `benchmarks/gpu.py` times the `forms` beside each other, and what it says of a device
is written into the constants here.
"""

from typing import NamedTuple

import torch
from torch import Tensor

PROGRAMS = 4 * 132  # four per multiprocessor of an H200
# most tokens for one program per head (q, k, v of 192 KiB in bfloat16 at width 32); computed, not measured: runs may be
# faster above 256 tokens
ONE_LAUNCH = 1024
ONE_LAUNCH_PROGRAMS = 72  # fewest heads in the batch that keep enough multiprocessors busy; two images of SANA-0.6B
SUMMED_IN_PLACE = 16  # most partial sums that the reader adds itself; beyond this a separate launch is faster


class Tiling(NamedTuple):
    """W columns of a tile for GROUP adjacent heads; T tokens in a tile, LOOPS tiles in a run; warps in a program.

    `single`: one program computes all passes of a head, and LOOPS tiles cover all tokens.
    """

    width: int
    group: int
    tile: int
    loops: int
    warps: int
    precision: str
    single: bool

    def runs(self, x: Tensor) -> int:
        """Number of runs of the tokens of x (B, N, H, D)."""
        return max(1, -(-x.shape[1] // (self.tile * self.loops)))

    def grid(self, x: Tensor) -> tuple[int, int]:
        """Launch grid for x (B, N, H, D): (B * groups of heads, runs)."""
        return x.shape[0] * -(-x.shape[2] // self.group), self.runs(x)


def plan(x: Tensor) -> Tiling:
    """Tiling of x (B, N, H, D): one launch for few tokens and many heads, otherwise runs of tokens.

    There are at least `PROGRAMS` programs if N allows, with runs of at most 64 tiles; sizes are powers of two so that
    few kernels are compiled. Tiles and warps are the largest that fit the shared memory of sm_90 (Hopper) and, in half
    precision at widths up to 64, spill no registers; the float32 backward spills at width 128. Heads are grouped until
    a token's row has 64 bytes.
    """
    batch, n, heads, _ = x.shape
    if n <= ONE_LAUNCH and batch * heads >= ONE_LAUNCH_PROGRAMS:
        return single(x)
    return split(x, group(x, 64))


def forms(x: Tensor) -> dict[str, Tiling]:
    """Tilings of x (B, N, H, D) that give the same up to the order of sums; `plan` takes one of the first two.

    Half tiles take fewer registers, which bound how many programs of the backward a multiprocessor holds.
    """
    both = {"one launch": single(x), "runs": split(x, group(x, 64))}
    return both | {f"{name}, half tiles": _half_tiles(cut) for name, cut in both.items()}


def _half_tiles(cut: Tiling) -> Tiling:
    return cut._replace(tile=max(16, cut.tile // 2), loops=2 * cut.loops)


def single(x: Tensor) -> Tiling:
    """One program per head."""
    cut = split(x, 1)
    return cut._replace(loops=power_of_two(-(-x.shape[1] // cut.tile)), single=True)


def split(x: Tensor, heads: int, programs: int = PROGRAMS) -> Tiling:
    """Runs of tokens with `heads` heads per program."""
    batch, n, all_heads, d = x.shape
    width = max(16, power_of_two(heads * d))
    tile = (64 if width < 128 else 32) // (1 if x.dtype == torch.bfloat16 else 2)
    loops = batch * -(-all_heads // heads) * n // (programs * tile)
    loops = min(64, 1 << max(0, loops.bit_length() - 1))
    return Tiling(width, heads, tile, loops, 4 if width < 64 else 8, precision(x.dtype, width), False)


def group(x: Tensor, row: int) -> int:
    """Adjacent heads for which a token's row has `row` bytes; 1 unless the width is a power of two, 16 or more."""
    d, heads = x.shape[3], 1
    while power_of_two(d) == d >= 16 and heads * d * x.element_size() < row and heads < x.shape[2] and heads * d < 64:
        heads *= 2
    return heads


def precision(dtype: torch.dtype, width: int) -> str:
    """Precision of Triton products with S or dS, sufficient for results that are rounded once to `dtype`."""
    if dtype == torch.bfloat16:
        return "tf32"
    return "tf32x3" if dtype == torch.float16 and width < 128 else "ieee"


def power_of_two(n: int) -> int:
    """Smallest power of two that is at least max(n, 1)."""
    return 1 << max(0, n - 1).bit_length()
