"""Ranges of numbers as annotations of options: `dim: Width = 1152`, or `Annotated[int, Ge(8)]` where no name fits.

`validation` checks them and `sana-lab parts` shows them. Upper ends are far beyond what runs, so that a slip of the
finger is one line at the start and neither hours of work nor an overflow.
"""

import math
from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt, MinLen

Width = Annotated[int, Ge(1), Le(2**16)]  # channels, heads, sides of kernels and patches
Depth = Annotated[int, Ge(1), Le(256)]  # blocks
Widths = Annotated[tuple[Width, ...], MinLen(1)]  # channels of each stage
Depths = Annotated[tuple[Annotated[int, Ge(0), Le(256)], ...], MinLen(1)]  # blocks of each stage
Pixels = Annotated[int, Ge(1), Le(2**15)]  # side of an image
BatchSize = Annotated[int, Ge(1), Le(2**16)]  # items at a time
Tokens = Annotated[int, Ge(2), Le(2**16)]  # length of a text
Count = Annotated[int, Ge(1), Le(10**7)]  # images, prompts or repeats
Number = Annotated[int, Ge(0), Le(10**7)]  # the same, where none is possible
Steps = Annotated[int, Ge(0), Le(10**8)]  # optimiser steps
Interval = Annotated[int, Ge(1), Le(10**8)]  # optimiser steps between two events
Evaluations = Annotated[int, Ge(1), Le(10_000)]  # steps of a solver
Workers = Annotated[int, Ge(0), Le(1024)]  # processes
Threads = Annotated[int, Ge(1), Le(1024)]
Seed = Annotated[int, Ge(0), Le(2**32 - 1)]
Images = Annotated[int, Ge(1), Le(10**13)]  # seen in training, each as often as it is
Flops = Annotated[float, Ge(1), Le(1e30)]
Share = Annotated[float, Ge(0), Le(1)]
Decay = Annotated[float, Ge(0), Lt(1)]  # of a moving average; momentum
Positive = Annotated[float, Gt(0), Le(1e9)]
Nonnegative = Annotated[float, Ge(0), Le(1e9)]  # weight of a loss, learning rate
Real = Annotated[float, Ge(-1e9), Le(1e9)]
Ratio = Annotated[float, Gt(0), Le(1024)]  # hidden width as a multiple of another
Angle = Annotated[float, Gt(0), Lt(math.pi / 2)]  # radians between data and noise
PositiveShare = Annotated[float, Gt(0), Le(1)]
ShareOrNumber = Annotated[int | float, Ge(0), Le(10**7)]  # a float below 1 is a share
