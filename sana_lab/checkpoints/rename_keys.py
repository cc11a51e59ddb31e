"""Rename and reshape state dicts by a key table: another format's tensors to ours, and back."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from sana_lab.checkpoints import mismatch, state_dicts
from sana_lab.checkpoints.key_tables import Row, Table


def to_ours(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], table: Table, source: str, unused: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Another format's tensors under our names and in our shapes, as views where no concatenation is needed.

    `own`, the model's state dict, gives names and shapes; names that are not in the table (latents' shift and scale)
    are left out. SpecError lists all that is missing, unexpected (but for the patterns `unused`) or wrongly shaped.
    """
    rows = {key: row for key in own if (row := row_of(key, table)) is not None}
    expected = {name: _shape_there(own[key], row) for key, row in rows.items() for name in row.names}
    state = state_dicts.select(state, expected, source)
    mismatch.check_state(expected, state, source, ignored=unused)
    return {key: _joined([state[name] for name in row.names], own[key]) for key, row in rows.items()}


def to_theirs(own: Mapping[str, Tensor], table: Table) -> dict[str, Tensor]:
    """Our tensors under another format's names and in its shapes; names that are not in the table are omitted."""
    state = {}
    for key, value in own.items():
        if (row := row_of(key, table)) is not None:
            shape, count = _shape_there(value, row), len(row.names)
            pieces = value.chunk(count) if count > 1 else (value,)
            state.update({name: piece.reshape(shape) for name, piece in zip(row.names, pieces, strict=True)})
    return state


def row_of(key: str, table: Table) -> Row | None:
    """The row of one of our tensors, `.weight` or `.bias` appended to its names."""
    module, _, leaf = key.rpartition(".")
    if key in table or module not in table:
        return table.get(key)
    row = table[module]
    return row._replace(names=tuple(f"{name}.{leaf}" for name in row.names))


def _shape_there(ours: Tensor, row: Row) -> tuple[int, ...]:
    """The shape of each of the row's tensors; biases and norms have the same in every format."""
    count = len(row.names)
    shape = (ours.shape[0] // count, *ours.shape[1:]) if count > 1 else tuple(ours.shape)
    if row.shape == "conv" and ours.ndim == 2:
        return (*shape, 1, 1)
    return shape[:2] if row.shape == "linear" else shape


def _joined(tensors: list[Tensor], like: Tensor) -> Tensor:
    return (tensors[0] if len(tensors) == 1 else torch.cat(tensors)).reshape(like.shape)
