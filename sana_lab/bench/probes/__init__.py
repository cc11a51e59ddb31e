"""Interface of the probes: the subject of a row of an efficiency table, counted from its shapes and timed."""

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch

Dtype = Literal["float32", "bfloat16", "float16"]

PROMPT = "a photo of a red circle left of a blue square"
"""The prompt of every probe that needs one."""


class ProbeSettings(NamedTuple):
    """How a probe is timed."""

    device: torch.device
    repeats: int  # timed calls, of which the median is taken
    warmup: int  # calls before them


class Probe(ABC):
    """A model or operator whose cost is measured. Nothing is allocated before `measure`, and weights are random: speed
    does not depend on them."""

    dtype: Dtype  # of weights and activations
    inside: str  # what the timer includes

    @abstractmethod
    def count(self) -> dict[str, float]:
        """Costs that follow from shapes: parameters, MACs, tokens. SpecError for what cannot be built."""

    @abstractmethod
    def measure(self, settings: ProbeSettings) -> dict[str, float]:
        """Measured costs. A metric `x` may come with the bounds `x_low` and `x_high` of its 95 % interval."""
