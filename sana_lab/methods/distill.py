"""Distillation of blocks: hidden states follow those of a frozen DiT, such as one with other mixers of tokens."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, final

import torch
from torch import Tensor, nn

from sana_lab.config.ranges import Nonnegative
from sana_lab.config.specs import Spec, SpecError
from sana_lab.methods import Method, Model, Step
from sana_lab.models.dit import Dit


@final
class Distill(Method):
    """Squared error of each block's output against the teacher's for the same noisy latents, over the mean square of
    the teacher's; mean over blocks.

    With a parent that has the teacher's weights, `attention: linear` in place of softmax begins with all of them.
    """

    velocities = True

    def __init__(
        self,
        teacher: Annotated[Spec, "dit"],  # frozen DiT of the same width and depth, such as experiment:NAME
        weight: Nonnegative = 1.0,  # factor of the term in the loss
    ) -> None:
        super().__init__()
        self.spec, self.weight = teacher, weight

    def build(self, model: Model) -> None:
        teacher = model.teacher(self.spec, self.name)
        own, given = ((dit.width, len(dit.blocks) if dit.width else 0) for dit in (model.dit, teacher))
        if own != given or not given[1]:
            raise SpecError(
                f"method {self.name!r} has a teacher of width {given[0]} and {given[1]} blocks, and the DiT has width "
                f"{own[0]} and {own[1]} blocks; expected the same"
            )
        self.blocks = range(model.depth)
        self.teachers = [teacher]  # in a list, so that no checkpoint holds it

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        t = step.times.view(-1, 1, 1, 1)
        text = step.of_rows(step.text, torch.arange(len(t), device=t.device))
        targets: list[Tensor] = []
        with torch.no_grad(), recording(self.teachers[0], targets) as teacher:
            teacher.without_guidance((1 - t) * step.latents + t * step.noise, step.times, text)
        pairs = [(step.hidden[block].float(), targets[block].float()) for block in self.blocks]
        ratios = [(own - target).square().mean() / target.square().mean() for own, target in pairs]
        return {self.name: torch.stack(ratios).mean()}


@contextmanager
def recording(dit: Dit, outputs: list[Tensor]) -> Iterator[Dit]:
    """Context in which the outputs of a DiT's blocks are appended to a list."""

    def record(run: Callable[..., Tensor], block: nn.Module, *arguments: Tensor | None) -> Tensor:
        outputs.append(run(block, *arguments))
        return outputs[-1]

    dit.around = record
    try:
        yield dit
    finally:
        dit.around = None
