"""Mean of the values over all tokens: the control in a comparison of mixers, blind to single tokens."""

from typing import final

from torch import Tensor

from sana_lab.config.ranges import Width
from sana_lab.models.attention import Attention


@final
class MeanAttention(Attention):
    """The mean of v over the tokens, the same for each of them; q and k are computed, and take no part."""

    def __init__(
        self,
        head_dim: Width = 32,  # width of a head; divides the model's width
        *,
        dim: int,
    ) -> None:
        super().__init__(dim, head_dim, qk_norm=False)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return v.mean(1, keepdim=True).expand_as(v)
