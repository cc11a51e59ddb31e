"""An attention: shared projections of q, k and v, and a mixing of tokens of its own."""

from torch import Tensor

from sana_lab.models.attention import Attention


class Mean(Attention):
    """Every token gets the mean of all values, times a gain."""

    def __init__(
        self,
        head_dim: int = 32,  # width of a head; a divisor of the DiT's width
        gain: float = 1.0,  # factor on the mean
        *,
        dim: int,  # width of the tokens, supplied by the DiT
    ) -> None:
        super().__init__(dim, head_dim, qk_norm=False)
        self.gain = gain

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (B, N, H, D) each
        """What a token reads of the others."""
        return self.gain * v.mean(1, keepdim=True).expand_as(v)
