"""Distillation of blocks: hidden states follow those of a frozen DiT, with other mixers or another text encoder."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, final

import torch
from torch import Tensor, nn

from sana_lab.config.ranges import Nonnegative
from sana_lab.config.specs import AsBefore, Spec, SpecError
from sana_lab.methods import Method, Model, Step
from sana_lab.models.dit import Dit
from sana_lab.models.text import TextEncoder
from sana_lab.types import Text


@final
class Distill(Method):
    """Squared error of each block's output against the teacher's for the same noisy latents, over the mean square of
    the teacher's; mean over blocks.

    With a parent that has the teacher's weights, `attention: linear` in place of softmax begins with all of them. With
    `text_encoder` the model's own may train: X2I (arXiv 2503.06134) so has a language model take the place of a DiT's
    text encoder, aligned by the outputs of attention to the text, which reach the outputs of blocks.
    """

    velocities = True

    def __init__(
        self,
        teacher: Annotated[Spec, "dit"],  # frozen DiT of the same width and depth, such as experiment:NAME
        weight: Nonnegative = 1.0,  # factor of the term in the loss
        # The teacher's own text encoder, such as experiment:NAME, which reads the same prompts; null: the teacher reads
        # the features of the model's, which is then frozen.
        text_encoder: Annotated[Spec | None, "text_encoder", AsBefore(None)] = None,
        objective: Annotated[Nonnegative, AsBefore(1.0)] = 1.0,  # factor of the objective's loss; 0: distillation alone
    ) -> None:
        super().__init__()
        self.spec, self.text_spec, self.weight, self.objective = teacher, text_encoder, weight, objective

    def build(self, model: Model) -> None:
        texts: list[TextEncoder] = [] if self.text_spec is None else [model.text_teacher(self.text_spec)]
        teacher = model.teacher(self.spec, self.name, *texts)
        own, given = ((dit.width, len(dit.blocks) if dit.width else 0) for dit in (model.dit, teacher))
        if own != given or not given[1]:
            raise SpecError(
                f"method {self.name!r} has a teacher of width {given[0]} and {given[1]} blocks, and the DiT has width "
                f"{own[0]} and {own[1]} blocks; expected the same"
            )
        self.blocks = range(model.depth)
        self.teachers, self.texts = [teacher], texts  # in lists, so that no checkpoint holds them

    def begin(self, step: Step) -> None:
        if self.objective != 1:
            step.weigh = lambda errors: torch.full_like(errors, self.objective)

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        t = step.times.view(-1, 1, 1, 1)
        targets: list[Tensor] = []
        with torch.no_grad(), recording(self.teachers[0], targets) as teacher:
            text = step.of_rows(self._text(step), torch.arange(len(t), device=t.device))
            teacher.without_guidance((1 - t) * step.latents + t * step.noise, step.times, text)
        pairs = [(step.hidden[block].float(), targets[block].float()) for block in self.blocks]
        ratios = [(own - target).square().mean() / target.square().mean() for own, target in pairs]
        return {self.name: torch.stack(ratios).mean()}

    def _text(self, step: Step) -> Text:
        """What the teacher reads of the B items: the features of its own text encoder, or the model's."""
        prompts = step.batch.prompts
        if not self.texts:
            return step.text
        return self.texts[0].with_dropout(prompts, step.dropped or [False] * len(prompts))


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
