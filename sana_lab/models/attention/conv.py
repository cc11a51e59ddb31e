"""Two 3 x 3 convolutions in the place of attention (DiC, arXiv 2501.00603): a view of 5 x 5 tokens per block."""

from typing import final

from torch import Tensor, nn

from sana_lab.config.ranges import Ratio, Width
from sana_lab.config.specs import SpecError
from sana_lab.models.attention import Mixer
from sana_lab.models.layers import hidden_width, saturated
from sana_lab.ops.gelu import gelu

AS_ATTENTION = 2 / 9
"""Hidden width per width with as many weights as the four projections of attention: 2 x 9 x ratio = 4."""


@final
class ConvMixer(Mixer):
    """conv2(GELU(GroupNorm(conv1(x)))), both 3 x 3 with zero padding. The norm is over the whole grid."""

    def __init__(
        self,
        ratio: Ratio = AS_ATTENTION,  # hidden width as a multiple of the model's; 1 in DiC, 2/9 weighs as attention
        groups: Width = 1,  # groups of the norm; divides the hidden width
        *,
        dim: int,
    ) -> None:
        super().__init__(dim)
        hidden = hidden_width(ratio, dim)
        if hidden % groups:
            raise SpecError(f"the convolutions' hidden width {hidden} is not a multiple of groups {groups}")
        self.expand = nn.Conv2d(dim, hidden, 3, padding=1)
        self.norm = nn.GroupNorm(groups, hidden)
        self.project = nn.Conv2d(hidden, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = gelu(self.norm(self.expand(x.permute(0, 3, 1, 2))))
        return saturated(self.project(hidden).permute(0, 2, 3, 1))
