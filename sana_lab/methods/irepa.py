"""Representation alignment of spatial structure (iREPA, arXiv 2512.10794): a convolution against normalised tokens."""

from collections.abc import Mapping
from typing import Annotated, final

from torch import Tensor, nn

from sana_lab.config.ranges import Nonnegative, Number, Positive, Share
from sana_lab.config.specs import Spec, SpecError
from sana_lab.methods import Method, Model, Step
from sana_lab.methods.teacher import Fit, Teacher, aligned

EPS = 1e-6
"""Added to the deviation over tokens."""


@final
class Irepa(Method):
    """As `repa`, with one 3 x 3 convolution as projector, and targets normalised over the tokens of an image."""

    needs_images = True

    def __init__(
        self,
        teacher: Annotated[Spec, "extractor"] = "shapes",  # frozen encoder: shapes, {name: dinov2, model: FOLDER} ...
        weight: Nonnegative = 0.5,  # lambda, factor of the term in the loss
        block: Number | None = None,  # block whose output is aligned, from 0; null is 8/28 of the depth, as in SiT-XL
        gamma: Share = 1.0,  # share of the mean over tokens that is subtracted from the targets
        fit: Fit = "pool",  # where grids differ: mean over cells of the finer one, interpolate the teacher, or refuse
        lr: Positive | None = None,  # learning rate of the convolution; null is that of the optimizer
    ) -> None:
        super().__init__()
        self.spec, self.weight, self.block, self.gamma, self.fit, self.lr = teacher, weight, block, gamma, fit, lr

    def build(self, model: Model) -> None:
        self.index = model.block(self.block, 8 / 28, self.name)
        self.blocks = (self.index,)
        self.teacher = Teacher(self.spec, self.fit, model, self.name)
        if (1, 1) in self.teacher.common:
            raise SpecError(
                f"method {self.name!r} normalises over the tokens of an image, and teacher and DiT have one in common; "
                "expected a teacher with more, or method repa"
            )
        self.projector = nn.Conv2d(model.width, self.teacher.dim, 3, padding=1)

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        projected = self.projector(step.hidden[self.index].movedim(-1, 1)).movedim(1, -1)
        targets = normalised(self.teacher.targets(step), self.gamma)
        return {self.name: -aligned(projected, targets)}


def normalised(tokens: Tensor, gamma: float) -> Tensor:
    """Tokens (B, h, w, D) minus gamma times their mean over the grid, over their standard deviation there."""
    deviation = tokens.std((1, 2), keepdim=True, correction=0)
    return (tokens - gamma * tokens.mean((1, 2), keepdim=True)) / (deviation + EPS)
