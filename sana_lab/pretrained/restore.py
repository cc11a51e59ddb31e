"""Models that the lab trained: from an experiment's weights file or a Lightning checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sana_lab.checkpoints import files, mismatch, state_dicts, weights
from sana_lab.config import experiments, guests, hashing, interpolation, registry, schema, specs
from sana_lab.config.validation import SpecError


def restore(experiment: schema.Config, path: Path) -> Any:
    """The experiment's system with the weights file of its training, in evaluation mode. SpecError.

    A frozen part that has no weights is in no file; it is initialised from the experiment's seed, as for training.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment["seed"])
        system = specs.build("system", experiment["system"])
    state = weights.read(path)
    for kind in sorted({key.split(".")[0] for key in state}):
        if (part := system.part(kind)) is None:
            raise SpecError(f"{path} holds weights of a part {kind!r}, which {type(system).__name__} does not have")
        weights.load_state(part, state, f"{kind}.", str(path))
    system.experiment = experiment
    return system.eval()


def from_checkpoint(path: Path) -> Any:
    """The system of a Lightning checkpoint, rebuilt from the specs in it, with the averaged weights. SpecError."""
    if not path.is_file():
        raise SpecError(f"there is no checkpoint {str(path)!r}")
    checkpoint = files.read_torch(path)
    if not isinstance(checkpoint, dict) or not {"hyper_parameters", "average"} <= checkpoint.keys():
        raise SpecError(f"{path} is no checkpoint of the lab: it holds no specs; for NVlabs' weights call it .pth")
    options = checkpoint["hyper_parameters"]
    interpolation.check_from_file(options, str(path), "system")
    guests.check(options, str(path))
    with guests.brought_by(str(path)):
        system = specs.build("system", {"name": system_with(options, path), **options})
    checkpoint = _unwrapped(checkpoint)
    if system.adapter is not None:
        raise SpecError(
            f"{path} is of a training with an adapter; expected its weights.safetensors, which has it merged"
        )
    mismatch.check_finite(checkpoint["state_dict"], str(path))
    mismatch.check_finite(checkpoint["average"].get("values", {}), str(path))
    system.on_load_checkpoint(checkpoint)  # first, as in Lightning: it reports a state dict that does not fit
    system.load_state_dict(checkpoint["state_dict"], strict=False)  # frozen parts are not in it
    system.write_average()
    return system.eval()


def _unwrapped(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint without the names of wrappers such as torch.compile's `_orig_mod.` in its tensors'."""
    state = {state_dicts.unwrapped(name): tensor for name, tensor in checkpoint["state_dict"].items()}
    average = checkpoint["average"]
    values = {state_dicts.unwrapped(name): tensor for name, tensor in average.get("values", {}).items()}
    return {**checkpoint, "state_dict": state, "average": {**average, "values": values}}


def system_with(options: Mapping[str, Any], path: Path) -> str:
    """The name of the system that has all these options, and of several the one with the fewest others. SpecError."""
    schemas = {name: specs.options("system", specs.find("system", name)) for name in registry.TABLE["system"]}
    fitting = [name for name, schema in schemas.items() if options.keys() <= schema.keys()]
    if not fitting:
        raise SpecError(f"{path} is of no system of the lab: none has the options {', '.join(options)}")
    return min(fitting, key=lambda name: len(schemas[name]))


def from_weights(path: Path) -> Any:
    """The system of a weights file that training wrote, by the experiment that its card holds or names. SpecError."""
    card = weights.card(path)
    if "experiment" not in card:
        raise SpecError(f"{path} has no card that says what it holds; expected a file that train or import wrote")
    with guests.brought_by(str(path)):
        return restore(_experiment_of(card, path), path)


def _experiment_of(card: Mapping[str, Any], path: Path) -> schema.Config:
    """The experiment that a card holds, or names and has the hash of. SpecError."""
    if "config" in card:
        guests.check(card["config"], str(path))
        return experiments.from_card(card["config"], str(path))
    name = guests.check_recipe(card["experiment"], str(path))
    experiment = experiments.load(name)
    if hashing.experiment_hash(experiment) != card.get("hash"):
        raise SpecError(
            f"{path} was trained as experiment {name!r} with other settings than it has now: {card.get('command')}; "
            f"expected its checkpoint (.ckpt), or load({name!r}, overrides)"
        )
    return experiment
