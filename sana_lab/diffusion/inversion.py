"""Inversion of a flow from data to noise, and values of self-attention handed from there to an edit (RF-Solver,
arXiv 2411.04746)."""

import inspect
import itertools
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sana_lab.config.ranges import Share
from sana_lab.config.specs import Spec, SpecError, build, name_of
from sana_lab.models.attention import Attention
from sana_lab.models.dit import Blockwise, SamplingDit
from sana_lab.types import Velocity

REVERSIBLE = ("rf_solver", "heun", "euler")
"""Solvers whose steps depend on no earlier ones and are defined for rising times."""


def check(solver: Spec, inject: Share) -> None:
    """SpecError for a solver that does not run in both directions, or a share out of range."""
    if name_of(solver) not in REVERSIBLE:
        raise SpecError(
            f"sampling.solver is {name_of(solver)!r}, which runs from noise to data alone; an edit expects one of "
            f"{', '.join(REVERSIBLE)}"
        )
    if not 0 <= inject <= 1:  # also of NaN
        raise SpecError(
            f"inject is {inject:g}, expected a share of the steps from 0 to 1; the nearest is {1 if inject > 1 else 0}"
        )


def invert(velocity: Velocity, data: Tensor, times: Tensor, solver: Spec = "rf_solver") -> Tensor:
    """The noise (B, C, h, w) that sampling at these falling times turns into the data, up to the error of the solver,
    which falls with its order: the same solver at the times in reverse."""
    return build("solver", solver)(velocity, data, times.flip(0))


class Values:
    """Values of the self-attention of some blocks at each time of an inversion, and their use in an edit.

    With q and k of the edit, the values keep what the picture looks like where the prompts agree (RF-Edit). An edit
    that evaluates between two stored times takes those of the nearest.
    """

    def __init__(self, layers: list[int]) -> None:
        self.layers = layers
        self.stored: dict[float, dict[int, Tensor]] = {}  # time -> block -> (B, N, H, D)
        self.time: float | None = None  # whose values are read; None reads none

    def storing(self, model: SamplingDit) -> Blockwise:
        """The denoiser, whose values are stored under `time`."""
        return _blockwise(model).replacing({i: partial(self._store, i) for i in self.layers})

    def reading(self, model: SamplingDit) -> Blockwise:
        """The denoiser with the values of the stored time nearest to `time` in place of its own."""
        return _blockwise(model).replacing({i: partial(self._read, i) for i in self.layers})

    def timed(self, velocity: Velocity, evaluations: int | None = None) -> Velocity:
        """The velocity with `time` set in its first `evaluations`, None is all, and no time after them."""
        counted = itertools.count()

        def at_time(x: Tensor, t: Tensor) -> Tensor:
            self.time = t.flatten()[0].item() if evaluations is None or next(counted) < evaluations else None
            return velocity(x, t)

        return at_time

    def _store(self, block: int, attention: Any, x: Tensor, rows: int) -> Tensor:
        assert self.time is not None
        kept = self.stored.setdefault(self.time, {})

        def keep(values: Tensor) -> Tensor:
            kept[block] = values[:rows].clone()
            return values

        return attention(x, keep)

    def _read(self, block: int, attention: Any, x: Tensor, rows: int) -> Tensor:
        if self.time is None:
            return attention(x)
        time = self.time
        nearest = min(self.stored, key=lambda t: abs(t - time))
        return attention(x, lambda values: self.stored[nearest][block].repeat(len(values) // rows, 1, 1, 1))


def storable(dit: Any) -> list[int]:
    """The blocks in the second half of a DiT whose mixer has values to hand over, as in RF-Edit. SpecError if none."""
    depth = len(getattr(dit, "blocks", ()))
    mixers = {i: getattr(dit.blocks[i], "attention", None) for i in range(depth // 2, depth)}
    able = [i for i, mixer in mixers.items() if _hands_over(mixer)]
    if not able:
        names = ", ".join(sorted({type(mixer).__name__ for mixer in mixers.values()})) or "no blocks"
        raise SpecError(
            f"inject hands over values of the self-attention in the second half of the blocks, and this DiT has {names}"
            " there, without values; expected 0, or a DiT with softmax, linear or another `Attention` there"
        )
    return able


def evaluations_of(inject: Share, times: Tensor, solver: Spec) -> int:
    """Evaluations of a solver in the first share of the steps (M - 1) at times (M,): of the nearest number of whole
    steps, at least one if the share is above 0."""
    steps = max(round(inject * (len(times) - 1)), inject > 0)
    counted = itertools.count()

    def count(x: Tensor, t: Tensor) -> Tensor:
        next(counted)
        return torch.zeros_like(x)

    build("solver", solver)(count, torch.zeros(1, 1, 1, 1), times[: steps + 1])
    return next(counted)


def _hands_over(mixer: object) -> bool:
    return isinstance(mixer, Attention) and "values" in inspect.signature(mixer.forward).parameters


def _blockwise(model: SamplingDit) -> Blockwise:
    if not isinstance(model, Blockwise):
        raise SpecError(f"inject needs a denoiser of blocks, and {type(model.dit).__name__} is none; expected 0")
    return model
