"""What the case files of kernels compare by: the device, dtypes, relative errors and their bars.

Triton decides when it is imported whether it interprets: the device is the CPU under the interpreter, else CUDA.
Kernels widen bfloat16 as they load, so that the interpreter, whose bfloat16 arithmetic is wrong, computes in float32.
"""

import torch
import triton
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
DEVICE = "cpu" if INTERPRETED else "cuda"
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32

# (outputs, gradients). Rounding a result alone costs 2.1e-4 in float16 and 1.7e-3 in bfloat16. The interpreter
# truncates to bfloat16 where a GPU rounds, so there it is allowed two units in the last place.
BARS = {FULL: (1e-6, 1e-6), HALF: (4e-4, 4e-4), BRAIN: (2.5e-3, 4e-3)}
BOUNDS = {**BARS, BRAIN: (8e-3, 8e-3)} if INTERPRETED else BARS


def error(a: Tensor, b: Tensor) -> float:
    """The L2 norm of the difference over that of `b`, in float64."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())
