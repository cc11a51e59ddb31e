"""Formats of released weights: which one a path is in, its tensors, its spec, and a part's state dict from them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sana_lab.checkpoints import architectures, files, hub, key_tables, nvlabs, rename_keys, state_dicts
from sana_lab.config import experiments, guests
from sana_lab.config.validation import SpecError

Spec = dict[str, Any]

FOLDERS = {"dit": "transformer", "autoencoder": "vae", "text_encoder": "text_encoder"}
"""Kind of part -> its folder in a diffusers pipeline."""

CHECKED_OPTIONS = (
    *("cross_heads", "time_scale", "guidance", "position", "base", "interpolation", "cross_norm_eps"),  # sana
    *("groups", "middle_attention"),  # vae
    *("head_dim", "last"),  # dcae
)
"""Options that change what a model computes and no shape of its tensors."""


class ReleasedWeights(NamedTuple):
    """Weights of one part in another format, with what is known of them."""

    kind: str
    spec: Spec
    supplied: Spec  # arguments that other parts would give the constructor
    tensors: Mapping[str, Tensor]  # read when they are accessed
    table: Callable[[Spec], key_tables.Table]
    source: str
    unused: tuple[str, ...] = ()  # patterns of tensors without a place here
    notes: tuple[str, ...] = ()  # choices, omissions and assumptions


def is_released(reference: str) -> bool:
    """Whether a reference is to weights in another format than the lab's."""
    path = Path(reference)
    if reference.startswith("experiment:") or (path.suffix == ".safetensors" and not path.is_file()):
        return False
    if path.suffix == ".safetensors":
        return path.name.startswith("diffusion_pytorch_model") or _is_nvlabs(files.tensor_names(path))
    return path.is_dir() or files.is_index(path) or path.suffix in (".pth", ".pt", ".bin") or hub.is_hub_id(reference)


def _is_nvlabs(names: list[str]) -> bool:
    """Whether a DiT of NVlabs is among these tensors, under any prefix."""
    return any(f".{name}".endswith(f".{nvlabs.REQUIRED_KEYS[0]}") for name in names)


def is_nvlabs_checkpoint(path: Path) -> bool:
    """Whether a file of torch.save contains an NVlabs DiT, in any training framework's checkpoint. SpecError."""
    if not path.is_file():
        return False
    return state_dicts.choose(files.read_torch(path), nvlabs.REQUIRED_KEYS, None, str(path)) is not None


def recognise(
    path: Path,
    kind: str | None = None,
    *,
    ema: bool | None = None,
    variant: str | None = None,
    like: Spec | None = None,
    **hints: Any,
) -> ReleasedWeights:
    """The weights of a diffusers component folder (or a pipeline's component of that kind), or of NVlabs' DiT.

    `ema` None takes averaged weights if there are any. `hints` are options of the part that a file may not hold; `like`
    is a spec that gives them where the width is none of NVlabs' own. SpecError for any other file or folder.
    """
    path = files.index_of(path)
    if path.is_dir():
        return _in_folder(path, kind, ema=ema, variant=variant, like=like, **hints)
    if path.suffix in (".safetensors", ".json"):
        if (path.parent / "config.json").is_file() and path.name.startswith("diffusion_pytorch_model"):
            return _component(path.parent, hints, files.read_safetensors(path))
        state = nvlabs.choose_state(files.read_safetensors(path), ema, str(path))
        return nvlabs_weights(state.tensors, str(path), like, **hints)
    state = nvlabs.choose_state(files.read_torch(path), ema, str(path))
    weights = nvlabs_weights(state.tensors, str(path), like, ignored=state.ignored, **hints)
    return weights._replace(notes=(f"taken: {state.name}", *weights.notes))


def _in_folder(
    path: Path, kind: str | None, *, ema: bool | None, variant: str | None, like: Spec | None, **hints: Any
) -> ReleasedWeights:
    if (path / "model_index.json").is_file():
        path = path / FOLDERS[kind or "dit"]
        if not path.is_dir():
            raise SpecError(f"{path.parent} has no {path.name}/; expected a diffusers component there")
    if (path / "config.json").is_file():
        return _component(path, hints, variant=variant)
    checkpoints = sorted([*path.glob("checkpoints/*.pth"), *path.glob("*.pth")])
    if len(checkpoints) != 1:
        entries = ", ".join(sorted(p.name for p in path.iterdir())) or "nothing"
        raise SpecError(f"{path} holds {entries}; expected model_index.json, config.json, or one .pth of NVlabs")
    return recognise(checkpoints[0], kind, ema=ema, like=like, **hints)


def _component(
    folder: Path, hints: Spec, tensors: Mapping[str, Tensor] | None = None, variant: str | None = None
) -> ReleasedWeights:
    """A component folder of diffusers, its class read from config.json; `tensors` in place of those of the folder."""
    architecture, spec, supplied = architectures.read(files.read_json(folder / "config.json"), str(folder))
    tensors = files.read_component(folder, variant) if tensors is None else tensors
    if architecture is architectures.ARCHITECTURES["AutoencoderKL"]:
        tensors = _with_current_names(tensors)
    guests.check([spec, supplied], str(folder))
    spec = experiments.merge(spec, hints)
    return ReleasedWeights(architecture.kind, spec, supplied, tensors, architecture.table, str(folder))


def _with_current_names(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A KL autoencoder's tensors, the attention layers of the first releases under today's names."""
    names = {}
    for key in tensors:
        layer = key.split(".")[-2] if ".attentions.0." in key else ""
        if layer in key_tables.VAE_OLD_ATTENTION:
            names[key] = key.replace(f".{layer}.", f".{key_tables.VAE_OLD_ATTENTION[layer]}.")
    return {names.get(key, key): tensors[key] for key in tensors} if names else tensors


def nvlabs_weights(
    state: Mapping[str, Tensor], source: str, like: Spec | None = None, ignored: tuple[str, ...] = (), **hints: Any
) -> ReleasedWeights:
    """NVlabs' DiT by its tensors; `ignored` names the other entries of its checkpoint.

    SpecError if it is another model, or an option is needed that the file does not hold.
    """
    nvlabs.check_architecture(state, source)
    hints = nvlabs.with_hints_of(like, state, hints)
    spec, supplied = nvlabs.infer_spec(state, source, hints)
    spec = experiments.merge(spec, hints)
    notes = tuple(nvlabs.notes(state, ignored, hints))
    table, unused = key_tables.sana_nvlabs, key_tables.NVLABS_UNUSED
    return ReleasedWeights("dit", spec, supplied, state, table, source, unused, notes)


def state_for(part: nn.Module, weights: ReleasedWeights) -> dict[str, Tensor]:
    """The part's complete state dict; tensors that need no reshaping are views of the file. SpecError."""
    own: dict[str, Tensor] = part.state_dict()
    spec: Any = part.spec
    state = rename_keys.to_ours(own, weights.tensors, weights.table(spec), weights.source, weights.unused)
    normalisation = {k: v for k, v in own.items() if k not in state}
    assert normalisation.keys() <= {"shift", "scale"}, normalisation.keys()
    values = {k: weights.spec.get(k, spec[k]) for k in normalisation}
    return state | {k: torch.full(v.shape, values[k], dtype=v.dtype) for k, v in normalisation.items()}


def check_kind(kind: str, weights: ReleasedWeights, reference: str) -> None:
    """SpecError if the weights are of another kind of part."""
    if weights.kind != kind:
        raise SpecError(f"{reference!r} holds a {weights.kind}, and the spec is of a {kind}")


def check_agree(spec: Spec, weights: ReleasedWeights) -> None:
    """SpecError if an option that shapes do not determine differs from the one the weights were trained with."""
    released = weights.spec
    for key in CHECKED_OPTIONS:
        if key in released and released[key] != spec.get(key) and _has_effect(key, released):
            raise SpecError(f"{weights.source} has {key} {released[key]!r}, and the spec says {spec.get(key)!r}")
    ours, theirs = spec.get("attention", {}), released.get("attention", {})
    for layer in ours if isinstance(ours, list) else [ours]:
        if "head_dim" in theirs and layer.get("head_dim") != theirs["head_dim"]:
            raise SpecError(f"{weights.source} has heads of {theirs['head_dim']}, the spec of {layer.get('head_dim')}")


def _has_effect(key: str, spec: Spec) -> bool:
    """Whether an option changes anything beside the others."""
    if key in ("base", "interpolation"):
        return spec.get("position") == "sincos"
    return key != "cross_norm_eps" or spec["cross_norm"]
