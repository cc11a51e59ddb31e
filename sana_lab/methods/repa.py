"""Representation alignment (REPA, arXiv 2410.06940): hidden states predict a frozen encoder's features of the image."""

from collections.abc import Mapping
from typing import Annotated, final

from torch import Tensor, nn

from sana_lab.config.ranges import Nonnegative, Number, Positive, Width
from sana_lab.config.specs import Spec
from sana_lab.methods import Method, Model, Step
from sana_lab.methods.teacher import Fit, Teacher, aligned


@final
class Repa(Method):
    """Minus the mean cosine over tokens of an MLP of the hidden states with the teacher's tokens of the clean image."""

    needs_images = True

    def __init__(
        self,
        teacher: Annotated[Spec, "extractor"] = "shapes",  # frozen encoder: shapes, {name: dinov2, model: FOLDER} ...
        weight: Nonnegative = 0.5,  # lambda, factor of the term in the loss
        block: Number | None = None,  # block whose output is aligned, from 0; null is 8/28 of the depth, as in SiT-XL
        hidden: Width = 512,  # width of the MLP's two hidden layers; 2048 in the paper
        fit: Fit = "pool",  # where grids differ: mean over cells of the finer one, interpolate the teacher, or refuse
        lr: Positive | None = None,  # learning rate of the MLP; null is that of the optimizer
    ) -> None:
        super().__init__()
        self.spec, self.weight, self.block, self.hidden, self.fit, self.lr = teacher, weight, block, hidden, fit, lr

    def build(self, model: Model) -> None:
        self.index = model.block(self.block, 8 / 28, self.name)
        self.blocks = (self.index,)
        self.teacher = Teacher(self.spec, self.fit, model, self.name)
        self.projector = nn.Sequential(
            *(nn.Linear(model.width, self.hidden), nn.SiLU()),
            *(nn.Linear(self.hidden, self.hidden), nn.SiLU()),
            nn.Linear(self.hidden, self.teacher.dim),
        )

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        projected = self.projector(step.hidden[self.index])
        return {self.name: -aligned(projected, self.teacher.targets(step))}
