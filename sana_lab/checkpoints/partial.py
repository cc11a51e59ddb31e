"""Weights of another model taken where they fit: kept, grown or left, and said so.

A tensor of another size grows if it is smaller in one dimension alone, such as the channels of another latent or the
rows of a table: the common part is copied. New inputs of a layer begin at zero, so that its outputs stay; new outputs
and rows as they are initialised. New blocks of a DiT begin as identities, as in SANA-1.5 (arXiv 2501.18427).
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

State = Mapping[str, Tensor]

BLOCK = re.compile(r"^dit\.blocks\.(\d+)\.")

OUTPUTS = ("attention.proj", "attention.project", "cross.proj", "ffn.project")
"""Last layers of a block's branches: a block in which they are zero changes nothing."""

GATED = re.compile(r"^(dit\.blocks\.\d+\.ffn\.)(expand|depthwise)\.")
"""Layers of a Mix-FFN, whose outputs are the values and, in their second half, the gates."""

LIMIT = 6
"""Tensors that are named of each kind in words."""


class Outcome(NamedTuple):
    """What became of the tensors of two models, by name."""

    kept: list[str]  # equal to the parent's
    grown: dict[str, tuple[list[int], list[int]]]  # shape of the parent's, and own shape
    new: list[str]  # of this model alone, as initialised
    left: list[str]  # of the parent alone, or of other shapes

    def lines(self) -> list[str]:
        """In words."""
        grown = [f"{name} {tuple(a)} -> {tuple(b)}" for name, (a, b) in self.grown.items()]
        return [
            f"kept {len(self.kept)} tensors",
            *(f"grown {len(grown)}: {_some(grown)}" for _ in grown[:1]),
            *(f"new {len(self.new)}: {_some(self.new)}" for _ in self.new[:1]),
            *(f"left {len(self.left)}: {_some(self.left)}" for _ in self.left[:1]),
        ]


def without_blocks(state: State, blocks: int | None) -> tuple[dict[str, Tensor], list[str]]:
    """A state with the first so many blocks of its DiT, and the names of what is left out."""
    left = [name for name in state if blocks is not None and (m := BLOCK.match(name)) and int(m[1]) >= blocks]
    return {name: tensor for name, tensor in state.items() if name not in left}, left


def fitted(own: State, parent: State, patch: int = 1) -> tuple[dict[str, Tensor], Outcome]:
    """The own state with the parent's values wherever they fit, and what became of each tensor.

    `patch` is the side of the DiT's patches, in each cell of which its last layer has all channels.
    """
    state, outcome = dict(own), Outcome([], {}, [], [])
    for name, tensor in own.items():
        source = parent.get(name)
        if source is None:
            outcome.new.append(name)
        elif source.shape == tensor.shape:
            state[name] = source.to(tensor.dtype)
            outcome.kept.append(name)
        elif _grows(source, tensor):
            state[name] = _grown(name, source, tensor, _cells(name, own, patch))
            outcome.grown[name] = ([*source.shape], [*tensor.shape])
        else:
            outcome.new.append(name)
            outcome.left.append(name)
    outcome.left.extend(name for name in parent if name not in own)
    for name in _outputs_of_new_blocks(own, parent):
        state[name] = torch.zeros_like(own[name])
    return state, outcome


def _grows(source: Tensor, own: Tensor) -> bool:
    """Whether one dimension is larger, and all others equal."""
    if source.ndim != own.ndim:
        return False
    other = [(a, b) for a, b in zip(source.shape, own.shape, strict=True) if a != b]
    return len(other) == 1 and other[0][0] < other[0][1]


def _cells(name: str, own: State, patch: int) -> int:
    """Equal parts of a tensor's rows that grow each by itself."""
    if name.startswith("dit.head.linear."):
        return patch * patch
    gated = GATED.match(name)
    return 2 if gated and f"{gated[1]}depthwise.weight" in own else 1


def _grown(name: str, source: Tensor, own: Tensor, cells: int) -> Tensor:
    """The own tensor, in each of whose parts the common part is the source's."""
    grown = own.clone().unflatten(0, (cells, -1))
    dimension = next(i for i, (a, b) in enumerate(zip(source.shape, own.shape, strict=True)) if a != b)
    if dimension and name.endswith("weight"):
        grown.zero_()
    grown[:, *(slice(n) for n in (source.shape[0] // cells, *source.shape[1:]))] = source.unflatten(0, (cells, -1)).to(
        own.dtype
    )
    return grown.flatten(0, 1)


def _outputs_of_new_blocks(own: State, parent: State) -> Iterable[str]:
    """Names of the last layers of blocks that the parent's DiT does not have; of a parent without a DiT, none."""
    blocks = {m[1] for name in parent if (m := BLOCK.match(name))}
    for name in own:
        match = BLOCK.match(name)
        if match and blocks and match[1] not in blocks and name[match.end() :].rpartition(".")[0] in OUTPUTS:
            yield name


def _some(names: list[str]) -> str:
    more = f" and {len(names) - LIMIT} more" if len(names) > LIMIT else ""
    return f"{', '.join(names[:LIMIT])}{more}"
