"""The lab's weights files: one safetensors file with its card, found by path or by `experiment:NAME`."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sana_lab.checkpoints import files, mismatch, state_dicts
from sana_lab.config import atomic_write
from sana_lab.config.memo import reuse
from sana_lab.config.schema import Config
from sana_lab.config.validation import SpecError

HOME = Path("runs")
"""Folder of trained models unless a caller gives another: HOME/models/<hash>/."""


def load_state(module: nn.Module, state: Mapping[str, Tensor], prefix: str, source: str) -> None:
    """Copy the tensors `prefix...` (or all, where none has the prefix) into a module. SpecError lists all that is
    missing, unexpected or wrongly shaped, or is not finite. Those of its `frozen` children may be missing."""
    inner: Mapping[str, Tensor] = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)} or dict(
        state
    )
    frozen = tuple(f"{name}." for name in getattr(module, "frozen", ()))
    shapes = mismatch.shapes_of(module.state_dict())
    expected = {name: shape for name, shape in shapes.items() if name in inner or not name.startswith(frozen)}
    inner = state_dicts.select(inner, expected, source)
    mismatch.check_state(expected, inner, source, type(module).__name__)
    mismatch.check_finite(inner, source)
    module.load_state_dict(dict(inner), strict=not frozen)


# Where weights are


def find(reference: str) -> Path:
    """The file of a path or of `experiment:NAME`. SpecError with the command to run if it is missing."""
    if not reference.startswith("experiment:"):
        path = Path(reference)
        if not path.is_file():
            raise SpecError(f"there is no weights file {reference!r}; expected a .safetensors file or experiment:NAME")
        return path
    from sana_lab.config import experiments

    name = reference.removeprefix("experiment:")
    return find_trained(experiments.load(name), name)


def find_trained(experiment: Config, name: str) -> Path:
    """The weights of an experiment, trained or shipped. SpecError with the command to run if there are none."""
    path = ready(experiment)
    if path is None:
        raise SpecError(
            f"experiment {name!r} is not trained yet and ships no weights for these settings; "
            f"run: sana-lab train {name}"
        )
    return path


def ready(experiment: Config) -> Path | None:
    """The weights that training this experiment gives, if it has been trained here or they are shipped."""
    return trained(experiment) or shipped(experiment)


def trained(experiment: Config) -> Path | None:
    """The weights that a finished training of this experiment has written here."""
    from sana_lab.config import hashing

    path = HOME / "models" / hashing.experiment_hash(experiment) / "weights.safetensors"
    return path if path.is_file() else None


def shipped(experiment: Config, folder: Path | None = None) -> Path | None:
    """The weights that ship for this experiment, in `folder` or with the lab: those whose card has its hash."""
    from sana_lab.config import experiments, hashing

    key = hashing.experiment_hash(experiment)
    folders = [folder] if folder else [root / "weights" for root in experiments.roots("experiments")]
    return reuse(("shipped", folders), lambda: _by_hash(folders)).get(key)


def _by_hash(folders: Iterable[Path]) -> dict[str, Path]:
    """The first weights file of each hash on a card."""
    paths = [path for each in folders for path in sorted(each.glob("*.safetensors"))]
    return {key: path for path in reversed(paths) if (key := card(path).get("hash"))}


# One file


def card(path: Path) -> dict[str, Any]:
    """The metadata of a weights file: experiment, hash, command, commit, measures. Empty if not written by sana_lab."""
    with files.open_safetensors(path) as file:
        text = (file.metadata() or {}).get("card", "{}")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{path} has a card that cannot be read: {files.first_line(error)}") from error
    if not isinstance(value, dict):
        raise SpecError(f"{path} has a card that is {type(value).__name__}, expected a mapping")
    return value


def read(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. SpecError for other files."""
    with files.open_safetensors(path) as file:
        return {key: files.read_tensor(file, key, path) for key in file.keys()}  # noqa: SIM118  (not a mapping)


def write(path: Path, state: Mapping[str, Tensor], about: Mapping[str, Any], dtype: torch.dtype | None = None) -> None:
    """Write tensors (floating-point ones as `dtype`) and their card to one file, atomically. OSError."""
    tensors = {k: (v.to(dtype) if dtype and v.is_floating_point() else v).contiguous().cpu() for k, v in state.items()}
    with atomic_write.replacing(path) as partial:
        save_file(tensors, partial, {"card": json.dumps(dict(about))})
