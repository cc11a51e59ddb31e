"""Interface of the probes: what a row of an efficiency table is about, counted from its shapes and timed."""

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch

Dtype = Literal["float32", "bfloat16", "float16"]

PROMPT = "a photo of a red circle left of a blue square"
"""What is drawn where a prompt is needed."""


class How(NamedTuple):
    """How a probe is timed."""

    device: torch.device
    repeats: int  # calls of which the median is taken
    warmup: int  # calls before them


class Probe(ABC):
    """Something that costs. Its options choose it; nothing is allocated before `measure`, and no weights are read:
    speed does not depend on them, so they are drawn at random.

    `dtype` is what it computes in, and `inside` says what is within the timer.
    """

    dtype: Dtype
    inside: str

    @abstractmethod
    def count(self) -> dict[str, float]:
        """What shapes alone say, on any machine: parameters, MACs, tokens. SpecError for what cannot be built."""

    @abstractmethod
    def measure(self, how: How) -> dict[str, float]:
        """What only a clock says; a metric `x` may come with the ends `x_low` and `x_high` of its 95 % interval."""
