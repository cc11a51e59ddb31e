"""Small networks of measures, built and loaded from the weights file of the system that trained them."""

from pathlib import Path
from typing import TypeVar

from torch import nn

from sana_lab.checkpoints import weights
from sana_lab.config import digests, experiments, guests, interpolation, specs
from sana_lab.config.schema import Config

Network = TypeVar("Network", bound=nn.Module)


def trained(reference: str, kind: type[Network]) -> tuple[Network, str]:
    """The frozen network of `experiment:NAME` or of such an experiment's weights file, and the file's SHA-256.

    SpecError if the file is missing or its weights do not fit.
    """
    path = weights.find(reference)
    system = _system_of(reference, path)
    network = kind(**{key: system[key] for key in specs.options("", kind) if key in system})
    weights.load_state(network, weights.read(path), "network.", reference)
    return network.eval().requires_grad_(False), digests.sha256(path)


def _system_of(reference: str, path: Path) -> Config:
    """The spec of the system that a weights file is of: the experiment's, or the one that its card holds or names."""
    card = weights.card(path)
    if reference.startswith("experiment:"):
        return experiments.load(reference.removeprefix("experiment:"))["system"]
    if "config" in card:
        guests.check(card["config"], str(path))
        interpolation.check_from_file(card["config"].get("system"), str(path), "system")
        return card["config"]["system"]
    with guests.brought_by(str(path)):
        return experiments.load(guests.check_recipe(card.get("experiment"), str(path)))["system"]
