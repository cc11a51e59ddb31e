"""Weights of parts on disk: one safetensors file with its card, found by path or by `experiment:NAME`."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sana_lab.checkpoints import files, formats
from sana_lab.config import experiments, hashing, schema
from sana_lab.config.specs import SpecError, nearest

HOME = Path("runs")
"""Where trained models lie unless a caller says otherwise: HOME/models/<hash>/."""


def load_into(module: nn.Module, reference: str, kind: str) -> None:
    """Give a part the weights of a file, of `experiment:NAME`, or of a released model: NVlabs' .pth, a diffusers folder
    or a hub id. On the meta device there is nothing to load."""
    if any(p.is_meta for p in module.parameters()):
        return
    if is_released(reference):
        _load_released(module, reference, kind)
    else:
        load_state(module, read(find(reference)), f"{kind}.", reference)


def is_released(reference: str) -> bool:
    """Whether a reference is to a model in another format than the lab's."""
    path = Path(reference)
    if reference.startswith("experiment:") or (path.suffix == ".safetensors" and not path.is_file()):
        return False
    if path.suffix == ".safetensors":
        return path.name.startswith("diffusion_pytorch_model") or formats.NVLABS[0] in files.names(path)
    return path.is_dir() or files.is_index(path) or path.suffix in (".pth", ".pt", ".bin") or files.is_hub_id(reference)


def _load_released(module: nn.Module, reference: str, kind: str) -> None:
    spec: Any = module.spec
    found = formats.find(files.find(reference), kind, like=spec)
    if found.kind != kind:
        raise SpecError(f"{reference!r} holds a {found.kind}, and the spec is of a {kind}")
    formats.check_agree(spec, found)
    module.load_state_dict(formats.state_for(module, found))


def find(reference: str) -> Path:
    """The file that a reference means. SpecError says what to run when it is not there."""
    if not reference.startswith("experiment:"):
        path = Path(reference)
        if not path.is_file():
            raise SpecError(f"there is no weights file {reference!r}; expected a .safetensors file or experiment:NAME")
        return path
    name = reference.removeprefix("experiment:")
    return find_trained(experiments.load(name), name)


def find_trained(experiment: schema.Config, name: str) -> Path:
    """The weights of an experiment, trained here or shipped. SpecError says what to run when there are none."""
    found = ready(experiment)
    if found is None:
        raise SpecError(
            f"experiment {name!r} is not trained yet and ships no weights for these settings; "
            f"run: sana-lab train {name}"
        )
    return found


def ready(experiment: schema.Config) -> Path | None:
    """The weights of what this experiment trains, trained here or shipped, where there are any."""
    return trained(experiment) or shipped(experiment)


def trained(experiment: schema.Config) -> Path | None:
    """The weights that training this experiment left behind, if it has ended."""
    path = HOME / "models" / hashing.experiment_hash(experiment) / "weights.safetensors"
    return path if path.is_file() else None


def shipped(experiment: schema.Config) -> Path | None:
    """The weights that come with the lab and whose card names exactly what this experiment trains."""
    key = hashing.experiment_hash(experiment)
    files = (path for root in experiments.roots("experiments") for path in sorted(root.glob("weights/*.safetensors")))
    return next((path for path in files if card(path).get("hash") == key), None)


def card(path: Path) -> dict[str, Any]:
    """What is known of a weights file: experiment, hash, command, commit, measures."""
    with files.opened(path) as file:
        return json.loads((file.metadata() or {}).get("card", "{}"))


def write(path: Path, state: Mapping[str, Tensor], about: Mapping[str, Any], dtype: torch.dtype | None = None) -> None:
    """Save tensors (floating ones as `dtype`) and their card in one file, atomically."""
    kept = {k: (v.to(dtype) if dtype and v.is_floating_point() else v).contiguous().cpu() for k, v in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".partial")
    save_file(kept, draft, {"card": json.dumps(dict(about))})
    draft.replace(path)


def read(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. SpecError where it is not one."""
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a mapping)
    except Exception as error:  # safetensors raises its own SafetensorError, which it does not export everywhere
        raise SpecError(f"{path} is not a safetensors file: {error}") from error


def load_state(module: nn.Module, state: Mapping[str, Tensor], prefix: str, source: str) -> None:
    """Copy `prefix...` tensors (or, where none has the prefix, all) into a module; every odd key or shape is named."""
    inner = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)} or dict(state)
    own = module.state_dict()
    problems = [*_odd_keys(own.keys(), inner.keys()), *_odd_shapes(own, inner)]
    if problems:
        raise SpecError(f"{source} does not fit {type(module).__name__}: " + "; ".join(problems[:6]))
    module.load_state_dict(inner)


def _odd_keys(own: Iterable[str], given: Iterable[str]) -> list[str]:
    own, given = set(own), set(given)
    missing = [
        f"{k} is missing ({nearest(k, given - own)})" if given - own else f"{k} is missing" for k in sorted(own - given)
    ]
    return missing[:3] + [f"{k} is not expected" for k in sorted(given - own)][:3]


def _odd_shapes(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    return [
        f"{k} is {tuple(given[k].shape)}, expected {tuple(v.shape)}"
        for k, v in own.items()
        if k in given and given[k].shape != v.shape
    ]
