"""Models from files, folders and hub ids of any format that the lab reads, and from trained experiments."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sana_lab.checkpoints import files, formats, hub, weights
from sana_lab.config import experiments, registry
from sana_lab.config.validation import SpecError


def load(
    reference: str | Path,
    kind: str | None = None,
    *,
    ema: bool | None = None,
    variant: str | None = None,
    dtype: torch.dtype | None = None,
    **hints: Any,
) -> Any:
    """A part with its `.spec`, or a whole text2image system, from a path or hub id, in evaluation mode.

    Formats: NVlabs' .pth, diffusers' SanaPipeline, SanaSprintPipeline and component folders (with `kind` dit,
    autoencoder or text_encoder that component of a pipeline), and the lab's own .ckpt and weights files. `ema` None
    takes averaged weights where a .pth has them. `variant` is diffusers' (fp16). Weights keep the file's dtype, memory-
    mapped and not copied, unless `dtype` is given. `hints` are options of the part that a file does not hold, such as
    cross_heads. A loaded pipeline is frozen: to train it, name it as `weights:` in an experiment. SpecError for
    anything else.
    """
    path = files.index_of(hub.locate(str(reference)))
    if variant is not None and not path.is_dir():
        raise SpecError(f"variant {variant!r} chooses among the files of a diffusers folder, and {path} is a file")
    model = _load(path, kind, ema=ema, variant=variant, **hints)
    return model if dtype is None else model.to(dtype)


def _load(path: Path, kind: str | None, **options: Any) -> Any:
    from sana_lab.pretrained import imported, released, restore

    if path.suffix == ".ckpt" and not formats.is_nvlabs_checkpoint(path):
        return _part_of(restore.from_checkpoint(path), kind, path)
    if path.suffix == ".safetensors" and (card := weights.card(path)):
        if "parts" in card:
            return _part_of(imported.load_import(path, card, options.get("text_encoder")), kind, path)
        return _part_of(restore.from_weights(path), kind, path)
    return released.load_released(path, kind, **options)[0]


def _part_of(model: Any, kind: str | None, path: Path) -> Any:
    """The model itself, or its part of that kind. SpecError if it has none."""
    if kind is None or (hasattr(model, "spec") and model.spec["name"] in registry.TABLE.get(kind, ())):
        return model
    part = dict(model.named_children()).get(kind)
    if part is None:
        raise SpecError(f"{path} holds a {type(model).__name__}, which has no {kind}")
    return part


def open_model(name: str, overrides: Sequence[str] = (), variant: str | None = None) -> Any:
    """The system of a trained experiment or of any reference that `load` accepts; `variant` selects diffusers' files.

    `overrides` ("key=value") apply to an experiment; of a loaded model they can only change sampling, and how a
    pipeline reads its prompts. SpecError.
    """
    if not is_model(name):
        from sana_lab.pretrained.restore import restore

        if variant is not None:
            raise SpecError(f"variant {variant!r} chooses among the files of a diffusers folder; {name!r} has none")
        experiment = experiments.load(name, overrides)
        return restore(experiment, weights.find_trained(experiment, name))
    text_options = experiments.apply({}, (o for o in overrides if o.startswith("text_encoder.")))
    changes = [o for o in overrides if not o.startswith("text_encoder.")]
    system = load(name, variant=variant, **text_options)
    if not overrides:
        return system
    if getattr(system, "experiment", None) is None or any(not o.startswith("sampling.") for o in changes):
        raise SpecError(
            f"{' '.join(overrides)} changes an experiment, and {name!r} is a checkpoint, which is as it is: of a "
            "system, only sampling.* can change, and of a pipeline text_encoder.*"
        )
    sampling = experiments.apply({"sampling": system.experiment["sampling"]}, changes)["sampling"]
    system.experiment = {**system.experiment, "sampling": experiments.check_sampling(sampling)}
    return system


def is_model(name: str) -> bool:
    """Whether a name means a file, folder or hub id, rather than an experiment.

    A folder with the name of an experiment, such as one of pictures, is a model only if it looks like one or the name
    has a slash.
    """
    path = Path(name)
    if name.endswith((*files.TORCH_SUFFIXES, ".safetensors")) or files.is_index(path):
        return True
    is_experiment = any((root / f"{name}.yaml").is_file() for root in experiments.roots("experiments"))
    if path.is_dir():
        looks_like_model = any((path / file).is_file() for file in ("model_index.json", "config.json"))
        return not is_experiment or "/" in name or looks_like_model
    return hub.is_hub_id(name) and not is_experiment
