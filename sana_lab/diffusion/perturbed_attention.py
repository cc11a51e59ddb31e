"""Perturbed-attention guidance (PAG, arXiv 2403.17377): away from a denoiser whose self-attention mixes no tokens."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sana_lab.config.specs import SpecError
from sana_lab.models.dit import Blockwise, Dit, SamplingDit


class Perturbation(NamedTuple):
    """Scale of the guidance, and the blocks whose self-attention is the identity in the perturbed rows."""

    scale: float
    layers: Sequence[int] | None = None  # None is the middle block

    def before(self, model: SamplingDit) -> Blockwise:
        """A denoiser of each caption twice, of which the rows of the first copy are perturbed. SpecError if it has no
        such blocks."""
        if not isinstance(model, Blockwise):
            raise SpecError(
                f"sampling.pag needs a denoiser of blocks, and {type(model.dit).__name__} is none; expected 0"
            )
        self.check(model.dit)
        indices = self.indices(len(model.dit.blocks))
        return model.twice().replacing(mixing=dict.fromkeys(indices, identity_of_first))

    def check(self, dit: Dit) -> None:
        """SpecError for a block that does not exist, or whose mixer has no identity."""
        depth = len(dit.blocks)
        able = [i for i in range(depth) if dit.blocks[i].attention.has_identity]
        if odd := [i for i in self.indices(depth) if i not in able]:
            name = type(dit.blocks[odd[0]].attention).__name__
            expected = f"sampling.pag_layers of {able}" if able else "sampling.pag 0"
            raise SpecError(
                f"sampling.pag replaces the mixing of tokens in block {odd[0]} by the identity, which its {name} does "
                f"not offer; expected {expected}"
            )

    def indices(self, depth: int) -> list[int]:
        """The blocks to perturb, of `depth`. SpecError for one that does not exist."""
        if self.layers is None:
            return [depth // 2]
        odd = next((i for i in self.layers if not 0 <= i < depth), None)
        if odd is not None:
            raise SpecError(
                f"sampling.pag_layers has block {odd} of a DiT of {depth}, expected 0 to {depth - 1}; the nearest is "
                f"{min(max(odd, 0), depth - 1)}"
            )
        return sorted(set(self.layers))


def identity_of_first(attention: Any, x: Tensor, rows: int) -> Tensor:
    """Self-attention of tokens (B, h, w, C), with the identity in place of the mixing in the first `rows` of them."""
    return torch.cat([attention.unmixed(x[:rows]), attention(x[rows:])])
