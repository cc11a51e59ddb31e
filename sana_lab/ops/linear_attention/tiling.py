"""Tiling of linear attention: tokens and heads of a Triton program, as functions of shape and dtype.

Nothing is tuned at run time.
"""

from typing import NamedTuple

import torch
from torch import Tensor

PROGRAMS = 4 * 132  # four for each processor of an H200
ONE_LAUNCH = 1024  # tokens: up to here a head's q, k, v (192 KiB of bfloat16, width 32) pass through one program
ONE_LAUNCH_PROGRAMS = 72  # heads in the batch that keep enough processors busy; two rows of SANA-0.6B
SUMMED_IN_PLACE = 16  # partial sums that a reader adds up by itself, before a launch of its own pays


class Tiling(NamedTuple):
    """W columns of a tile, for GROUP heads side by side; T tokens in a tile, LOOPS tiles in a run; warps in a program.

    `single`: one program takes a head through all passes, and LOOPS tiles hold all tokens.
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
        """Programs for x (B, N, H, D): (B * groups of heads, runs)."""
        return x.shape[0] * -(-x.shape[2] // self.group), self.runs(x)


def plan(x: Tensor) -> Tiling:
    """Tiling of x (B, N, H, D): one launch where tokens are few and heads many, else runs of tokens.

    Runs make at least `PROGRAMS` programs where N allows it, of at most 64 tiles, in powers of two so that few kernels
    are compiled. Tiles and warps are the largest that fit the shared memory of sm_90 (Hopper) and, in half precision at
    widths to 64, spill no registers; the float32 backward spills at width 128. Heads are grouped until a token's row is
    64 bytes.
    """
    batch, n, heads, _ = x.shape
    if n <= ONE_LAUNCH and batch * heads >= ONE_LAUNCH_PROGRAMS:
        return single(x)
    return split(x, group(x, 64))


def single(x: Tensor) -> Tiling:
    """A head to a program."""
    cut = split(x, 1)
    return cut._replace(loops=power_of_two(-(-x.shape[1] // cut.tile)), single=True)


def split(x: Tensor, heads: int, programs: int = PROGRAMS) -> Tiling:
    """Runs of tokens, `heads` heads at a time."""
    batch, n, all_heads, d = x.shape
    width = max(16, power_of_two(heads * d))
    tile = (64 if width < 128 else 32) // (1 if x.dtype == torch.bfloat16 else 2)
    loops = batch * -(-all_heads // heads) * n // (programs * tile)
    loops = min(64, 1 << max(0, loops.bit_length() - 1))
    return Tiling(width, heads, tile, loops, 4 if width < 64 else 8, precision(x.dtype, width), False)


def group(x: Tensor, row: int) -> int:
    """Heads side by side so that a token's row has `row` bytes; 1 for widths that are no power of two from 16 on."""
    d, heads = x.shape[3], 1
    while power_of_two(d) == d >= 16 and heads * d * x.element_size() < row and heads < x.shape[2] and heads * d < 64:
        heads *= 2
    return heads


def precision(dtype: torch.dtype, width: int) -> str:
    """Precision of Triton products with S or dS, enough for results to be rounded once, in `dtype`."""
    if dtype == torch.bfloat16:
        return "tf32"
    return "tf32x3" if dtype == torch.float16 and width < 128 else "ieee"


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n and 1."""
    return 1 << max(0, n - 1).bit_length()
