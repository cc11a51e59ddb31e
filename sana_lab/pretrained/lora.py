"""LoRA files of diffusers' SANA pipelines (`pytorch_lora_weights.safetensors`): written, and merged into a DiT."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sana_lab.checkpoints import architectures, files, rename_keys
from sana_lab.config import atomic_write
from sana_lab.config.validation import SpecError, nearest
from sana_lab.systems.adapters import Factors

FILE = "pytorch_lora_weights.safetensors"
"""The name that `SanaPipeline.load_lora_weights` looks for in a folder."""

PREFIX = "transformer."
METADATA = "lora_adapter_metadata"
"""Key of diffusers' metadata, with the scale."""


def write(path: Path, dit: nn.Module, factors: Factors) -> None:
    """Write the changes of a DiT's layers under diffusers' names, the scale in B. SpecError where diffusers has no such
    DiT, or a layer that it does not have is changed."""
    spec: Any = dit.spec
    table = architectures.class_of(spec)[1].table(spec)
    state: dict[str, Tensor] = {}
    for layer, (down, up) in factors.items():
        row = rename_keys.row_of(f"{layer}.weight", table)
        if row is None:
            raise SpecError(f"diffusers' DiT has no layer {layer!r}, which the LoRA changes")
        for name, piece in zip(row.names, up.chunk(len(row.names)), strict=True):
            base = PREFIX + name.removesuffix(".weight")
            pair = (x[:, :, None, None] if row.shape == "conv" else x for x in (down, piece))
            state |= {f"{base}.lora_{side}.weight": factor for side, factor in zip("AB", pair, strict=True)}
    with atomic_write.replacing(path) as partial:
        save_file({name: tensor.detach().cpu().clone() for name, tensor in state.items()}, partial, {"format": "pt"})


@torch.no_grad()
def merge(dit: nn.Module, path: str | Path, strength: float = 1.0) -> None:
    """Add the changes of a LoRA file, or of a folder with one, to a DiT's weights in place. SpecError."""
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise SpecError(f"there is no LoRA file {str(path)!r}; expected {FILE}, of sana_lab or of diffusers")
    state, scale = _read(path)
    spec: Any = dit.spec
    table = architectures.class_of(spec)[1].table(spec)
    used: set[str] = set()
    for key, weight in dit.named_parameters():
        row = rename_keys.row_of(key, table)
        pieces = [] if row is None else [_change(state, name.removesuffix(".weight"), used) for name in row.names]
        if any(piece is not None for piece in pieces):
            shape = (len(weight) // len(pieces), weight[0].numel())
            changes = [torch.zeros(shape) if piece is None else piece for piece in pieces]
            if other := next((tuple(change.shape) for change in changes if change.shape != shape), None):
                raise SpecError(f"{path} changes {key} by a matrix of {other}, expected {shape}")
            weight.add_((strength * scale * torch.cat(changes)).view_as(weight).to(weight))
    if unused := [name for name in state if name not in used]:
        raise SpecError(
            f"{path} changes what this DiT does not have: {', '.join(unused[:5])}; {_layers(unused, table)}"
        )


def _read(path: Path) -> tuple[dict[str, Tensor], float]:
    """The factors of a file, and the scale of its metadata. SpecError."""
    with files.open_safetensors(path) as file:
        about = json.loads((file.metadata() or {}).get(METADATA, "{}"))
        state = {key: files.read_tensor(file, key, path) for key in file.keys()}  # noqa: SIM118  (not a mapping)
    if not state or not all(".lora_A." in key or ".lora_B." in key for key in state):
        other = next((key for key in state if ".lora_" not in key), "nothing")
        raise SpecError(f"{path} holds {other}; expected lora_A and lora_B of layers alone")
    if any(about.get(f"{PREFIX}{name}_pattern") for name in ("rank", "alpha")):
        raise SpecError(f"{path} has ranks or scales for each layer, which are not read; expected one of all")
    rank = about.get(f"{PREFIX}r")
    return state, float(about.get(f"{PREFIX}lora_alpha", rank)) / rank if rank else 1.0


def _change(state: Mapping[str, Tensor], name: str, used: set[str]) -> Tensor | None:
    """B A (out, in) of a layer in diffusers' names; None without one."""
    keys = [f"{PREFIX}{name}.lora_{side}.weight" for side in "AB"]
    if not all(key in state for key in keys):
        return None
    used.update(keys)
    down, up = (state[key].double().flatten(1) for key in keys)
    return up @ down


def _layers(unused: list[str], table: Mapping[str, Any]) -> str:
    names = {f"{PREFIX}{name}" for row in table.values() for name in row.names}
    return nearest(unused[0].partition(".lora_")[0], names)
