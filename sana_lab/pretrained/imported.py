"""Released weights as one weights file of the lab: written by the verb `import`, loaded again by its card."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sana_lab.checkpoints import files, hub, mismatch, weights
from sana_lab.checkpoints.build import build_on_meta
from sana_lab.config import experiments, guests
from sana_lab.config.validation import SpecError
from sana_lab.models.dit import Dit
from sana_lab.pretrained import parts
from sana_lab.systems import System

Spec = dict[str, Any]


def write_import(reference: str | Path, out: Path, kind: str | None = None, **options: Any) -> Spec:
    """Write a released model as one weights file, in its own dtype; its card, from which the model is rebuilt.

    Of a pipeline, that is the DiT and the autoencoder; the text encoder is read from its folder. SpecError if the
    file is the lab's already.
    """
    from sana_lab.pretrained.released import load_released

    path = files.index_of(hub.locate(str(reference)))
    _check_not_ours(path)
    model, notes = load_released(path, kind, text=False, **options)
    is_pipeline = isinstance(model, System)
    modules = {"dit": model.dit, "autoencoder": model.autoencoder} if is_pipeline else {_kind(model): model}
    card: Spec = {
        "imported": str(reference),
        "notes": list(notes),
        "parts": {k: {"spec": part.spec, "supplied": parts.supplied(part)} for k, part in modules.items()},
    }
    if is_pipeline:
        size = model.experiment["data"]["size"] // model.autoencoder.downsample
        card |= {"system": model.spec, "sampling": model.experiment["sampling"], "size": size}
    state = {f"{k}.{name}": tensor for k, part in modules.items() for name, tensor in part.state_dict().items()}
    weights.write(out, state, card)
    return card


def _check_not_ours(path: Path) -> None:
    is_ours = path.suffix == ".safetensors" and weights.card(path)
    if path.suffix != ".ckpt" and not is_ours:
        return
    use = f"as it is, such as `weights: {path}` in an experiment" if is_ours else f"with `--model {path}`"
    raise SpecError(f"{path} is the lab's already, nothing to import: use it {use}, or export it for diffusers")


def _kind(part: nn.Module) -> str:
    return "dit" if isinstance(part, Dit) else "autoencoder"


def load_import(path: Path, card: Mapping[str, Any], text_encoder: Spec | None = None) -> Any:
    """The part of a file that `write_import` wrote, or the system, whose text encoder is read from its old folder.

    `text_encoder` changes options of how prompts are read.
    """
    for key in ("parts", "system", "sampling"):
        guests.check(card.get(key), str(path))
    with guests.brought_by(str(path)):
        return _build(path, card, text_encoder)


def _build(path: Path, card: Mapping[str, Any], text_encoder: Spec | None) -> Any:
    tensors = files.read_safetensors(path)
    modules = {kind: _load_part(path, tensors, kind, **part) for kind, part in card["parts"].items()}
    if "system" not in card:
        return next(iter(modules.values()))
    from sana_lab.pretrained.pipeline import assemble

    system = experiments.merge(card["system"], {"text_encoder": text_encoder or {}})
    return assemble(system, modules, card["sampling"], card["size"])


def _load_part(path: Path, tensors: Mapping[str, Tensor], kind: str, spec: Spec, supplied: Spec) -> nn.Module:
    part = build_on_meta(kind, spec, **supplied)
    state = {k.removeprefix(f"{kind}."): tensors[k] for k in tensors if k.startswith(f"{kind}.")}
    mismatch.check_state(mismatch.shapes_of(part.state_dict()), state, str(path), kind)
    return parts.fill(part, state, str(path))
