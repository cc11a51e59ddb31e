"""Interface of the probes: one row of an efficiency table, counted from shapes and timed."""

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch

Dtype = Literal["float32", "bfloat16", "float16"]

PROMPT = "a photo of a red circle left of a blue square"
"""The prompt of every probe that needs one."""


class ProbeSettings(NamedTuple):
    """Timing options of a probe."""

    device: torch.device
    repeats: int  # timed calls; the median is reported
    warmup: int  # calls before timing


class Probe(ABC):
    """A model or operator whose cost is measured. Nothing is allocated before `measure`, and weights are random: speed
    does not depend on them."""

    dtype: Dtype  # of weights and activations
    inside: str  # what the timer includes
    summary: str | None = None  # how readings become numbers; None is the median of the table's repeats

    @abstractmethod
    def count(self) -> dict[str, float]:
        """Costs derived from shapes: parameters, MACs, tokens. SpecError for an invalid model."""

    @abstractmethod
    def measure(self, settings: ProbeSettings) -> dict[str, float]:
        """Measured costs. A metric `x` may have bounds `x_low` and `x_high` of its 95 % interval."""
