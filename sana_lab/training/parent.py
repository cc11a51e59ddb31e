"""The model that a training begins from (`parent:`): its weights, whole or where they fit, or its last checkpoint."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sana_lab.checkpoints import files, mismatch, partial, weights
from sana_lab.config import experiments, interpolation, registry, specs
from sana_lab.config.atomic_write import replacing, write_text
from sana_lab.config.schema import Config
from sana_lab.config.specs import SpecError, name_of
from sana_lab.systems import System
from sana_lab.training.resume import latest

FILE = "parent.json"
"""What a training took from its parent, in the model's folder, for a training that resumes without the parent."""

OWN_STATE = ("Clock", "DivergenceGuard", "Points")
"""Callbacks whose state is of one training: time, returns, and the time of points."""


First = Callable[[Callable[[], Any]], Any]
"""`ranks.first`: what the first rank decides, on every rank."""


def begin(system: System, experiment: Config, home: Path, first: First) -> dict[str, Any]:
    """Give a system its parent's weights, unless its own training has begun; the entries of the card about it.

    With `parent.resume` the parent's last checkpoint becomes the first of this training. SpecError if weights do not
    fit, or there is no checkpoint.
    """
    options = experiment["parent"]
    if options["weights"] is None:
        return {}
    previous: dict[str, Any] | None = first(lambda: _read(home) if latest(home) else None)
    if previous is not None:
        return previous
    about = identity(options["weights"])
    if options["resume"]:
        about["resumed"] = first(lambda: _copy_checkpoint(options["weights"], home))
    else:
        about |= _load(system, options, tensors(options["weights"]))
    entries = {"parent": about}
    first(lambda: _write(home, entries))
    return entries


def check(system: System, experiment: Config) -> list[str]:
    """What would be kept, grown and left, in words; nothing where the parent is not trained yet or on a hub. SpecError
    if its weights do not fit; only headers are read."""
    options = experiment["parent"]
    if (reference := options["weights"]) is None:
        return []
    if options["fit"] == "exact" and options["blocks"] is not None:
        raise SpecError(
            f"parent.blocks is {options['blocks']}, and parent.fit 'exact' keeps all; expected fit: partial"
        )
    if reference.startswith("experiment:"):
        path = trained_weights(reference.removeprefix("experiment:"))
    else:
        path = Path(reference) if reference.endswith(".safetensors") else None
    if path is None:
        return []
    if options["resume"]:
        path = weights.find(str(path))
        _last_checkpoint(path)
        _check_optimizer(experiment, weights.card(path))
        return []
    return lines({"parent": _load(system, options, files.read_header(weights.find(str(path))))})


def identity(reference: str) -> dict[str, Any]:
    """What a card says of a parent: where its weights are, and their hash, experiment and steps where known."""
    about: dict[str, Any] = {"weights": reference}
    path = _file(reference)
    card = {} if path is None else weights.card(path)
    return about | {key: card[key] for key in ("experiment", "hash", "steps") if key in card}


def tags(experiment: Config) -> dict[str, str]:
    """The tag of a run that names its model's parent, by hash, or as it was given."""
    reference = experiment["parent"]["weights"]
    return {} if reference is None else {"sana.parent": str(identity(reference).get("hash", reference))}


def tensors(reference: str) -> dict[str, Tensor]:
    """The weights of a model with the names of their parts as prefixes. SpecError."""
    path = _file(reference)
    if path is not None:
        return weights.read(path)
    from sana_lab.pretrained import loading  # here, as it imports all formats

    model = loading.load(reference)
    if isinstance(model, System):
        return dict(model.state_dict())
    kind = next(k for k in registry.WEIGHTED if name_of(model.spec) in registry.TABLE[k])
    return {f"{kind}.{name}": tensor for name, tensor in model.state_dict().items()}


def lines(entries: Mapping[str, Any]) -> list[str]:
    """The entries of a card in words."""
    about = entries["parent"]
    if "resumed" in about:
        return [f"goes on from step {about['resumed']:,} of {about['weights']}"]
    outcome = partial.Outcome(*(about[key] for key in partial.Outcome._fields))
    return outcome.lines()


def _load(system: System, options: Config, state: Mapping[str, Tensor]) -> dict[str, Any]:
    own = system.trained()
    if options["fit"] == "exact":
        mismatch.check_state(mismatch.shapes_of(own), state, options["weights"], type(system).__name__)
    kept, left = partial.without_blocks(state, options["blocks"])
    dit = system.part("dit")
    values, outcome = partial.fitted(own, kept, 1 if dit is None else dit.patch)
    if not outcome.kept and not outcome.grown:
        raise SpecError(
            f"parent.weights {options['weights']!r} has no tensor that fits {type(system).__name__}; it holds "
            f"{', '.join([*state][:3])}, expected names such as {', '.join([*own][:3])}"
        )
    _check_frozen(system, outcome, options["weights"])
    mismatch.check_finite(values, options["weights"])
    system.load_state_dict(values, strict=False)
    system.average.restart(system.averaged_module)
    return outcome._replace(left=[*left, *outcome.left])._asdict()


def _check_frozen(system: System, outcome: partial.Outcome, reference: str) -> None:
    """SpecError for parameters that do not train and that the parent does not have whole."""
    frozen = {name for name, p in system.named_parameters() if not p.requires_grad}
    lacking = [name for name in (*outcome.new, *outcome.grown) if name in frozen]
    if lacking:
        shape = tuple(system.get_parameter(lacking[0]).shape)
        raise SpecError(
            f"parent.weights {reference!r} has no {lacking[0]} of shape {shape}, which does not train here, nor "
            f"{len(lacking) - 1} others; expected the parent's options of that part, or parts that train"
        )


def _copy_checkpoint(reference: str, home: Path) -> int:
    """Make the parent's last checkpoint the first of this training, in its only epoch and at time 0; its step."""
    path = _last_checkpoint(weights.find(reference))
    checkpoint = files.read_torch(path)
    for key in OWN_STATE:
        checkpoint["callbacks"].pop(key, None)
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]
    for counts in epochs.values():  # as before the end of the only epoch
        counts.update(processed=counts["ready"] - 1, completed=counts["ready"] - 1)
    step = int(checkpoint["global_step"])
    with replacing(home / f"step={step}.ckpt") as partial_file:
        torch.save(checkpoint, partial_file)
    return step


def _check_optimizer(experiment: Config, card: Mapping[str, Any]) -> None:
    """SpecError for options of the optimiser that differ from the parent's, whose checkpoint would overrule them. Those
    that a card holds as a variable of the environment are not compared."""
    own = interpolation.as_written(experiment)["system"]
    before = card.get("config", {}).get("system", {})
    if "optimizer" not in before or "${" in str(before["optimizer"]):
        return
    for option, values in {
        "optimizer": [specs.canonical("optimizer", system["optimizer"]) for system in (experiment["system"], before)],
        "groups": [system.get("groups") or {} for system in (own, before)],
    }.items():
        if values[0] != values[1]:
            raise SpecError(
                f"parent.resume goes on with the parent's optimiser, and system.{option} differs: {values[0]}, the "
                f"parent's is {values[1]}; expected parent.resume=false"
            )


def _last_checkpoint(path: Path) -> Path:
    """The newest checkpoint beside a weights file. SpecError."""
    checkpoint = latest(path.parent)
    if checkpoint is None:
        raise SpecError(
            f"parent.resume goes on from a checkpoint beside {path}, and there is none; expected parent.resume=false, "
            "which begins with these weights and a new optimiser"
        )
    return Path(checkpoint)


def _file(reference: str) -> Path | None:
    """The weights file of the lab behind a reference; None for a model in another format. SpecError."""
    if reference.startswith("experiment:") or reference.endswith(".safetensors"):
        path = weights.find(reference)
        return path if weights.card(path) else None
    return None


def trained_weights(name: str) -> Path | None:
    """The weights of an experiment; None if it is not trained, or if its data, needed for its hash, are missing."""
    experiment = experiments.load(name)
    try:
        return weights.ready(experiment)
    except ValueError:
        return None


def _write(home: Path, entries: dict[str, Any]) -> None:
    write_text(home / FILE, json.dumps(entries, indent=2))
    print("\n".join(f"parent: {line}" for line in lines(entries)), flush=True)


def _read(home: Path) -> dict[str, Any] | None:
    path = home / FILE
    entries: dict[str, Any] | None = json.loads(path.read_text()) if path.is_file() else None
    return entries
