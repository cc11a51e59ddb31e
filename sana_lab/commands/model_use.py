"""Which trained models are in use: by runs, by experiments, and by whatever takes weights from an experiment.

A model is in use where it cannot be known: its experiment does not load or its data are away, or runs are elsewhere.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from omegaconf import OmegaConf

from sana_lab.checkpoints import weights
from sana_lab.checkpoints.weights import HOME
from sana_lab.config import experiments, hashing, specs, stages
from sana_lab.config.memo import reusing
from sana_lab.config.schema import Config
from sana_lab.config.specs import SpecError
from sana_lab.tracking import database
from sana_lab.tracking.store import CONFIG, Run, Store
from sana_lab.tracking.view import CURRENT, STATE

REFERENCE = re.compile(r"experiment:([^\s\"',{}\[\]]+)")
"""`experiment:NAME` in the text of a YAML file."""

KINDS = ("experiments", "ablations", "eval")
"""Folders of recipes that may take weights from experiments."""

ERRORS = (ValueError, OSError, ImportError, RuntimeError, LookupError)
"""Errors of an experiment that cannot be loaded, or whose data are away."""


class Use(NamedTuple):
    """What is known of the use of models."""

    models: set[str]  # in use
    recorded: set[str]  # models that some run names, current or not
    unknown: dict[str, object]  # experiment whose model is not known now -> its data, or None for any
    elsewhere: list[str]  # sweeps of this folder whose runs are in no database here

    def of(self, model: Path) -> bool:
        """Whether a model's folder is in use, or may be."""
        if model.name in self.models:
            return True
        if model.name not in self.recorded and self.elsewhere:
            return True
        name, data = _origin(model)
        if name is not None:
            return _stem(name) in {_stem(each) for each in self.unknown}
        return model.name not in self.recorded and any(each in (None, data) for each in self.unknown.values())


def use(store: Store) -> Use:
    """The use of the models in the folder of runs."""
    runs = [(each, run) for each in stores(store) for name in each.experiments() for run in each.summaries(name)]
    current = [(each, run) for each, run in runs if run.tags.get(STATE, CURRENT) == CURRENT]
    models = {run.tags.get("sana.model", "") for _, run in current}
    with reusing():
        hashes, unknown = _hashes([*recipe_names(), *_referenced(_texts(current))])
        others, without = _hashes(_paths())
    unknown = {**dict.fromkeys(without, ()), **unknown}  # a path on a card is of that model alone
    sweeps = {name for each in stores(store) for name in each.experiments()}
    elsewhere = sorted(name for name in _sweeps() if name not in sweeps)
    return Use(models | hashes | others, {run.tags.get("sana.model", "") for _, run in runs}, unknown, elsewhere)


def stores(store: Store) -> list[Store]:
    """A store, and the database of its home where MLFLOW_TRACKING_URI says that runs are elsewhere."""
    own = Store(store.home, local=True)
    differs = store.server is not None or store.database != own.database
    return [store, own] if differs and database.exists(own.database) else [store]


def recipe_names() -> list[str]:
    """All experiments in folders of experiments, with their stages."""
    roots = experiments.roots("experiments")
    names = sorted(
        {path.relative_to(root).with_suffix("").as_posix() for root in roots for path in root.rglob("*.yaml")}
    )
    for name in [*names]:
        with contextlib.suppress(*ERRORS):
            names += experiments.stages_of(name)
    return names


def _texts(current: Iterable[tuple[Store, Run]]) -> Iterator[str]:
    """Recipes, configurations of models, and those of current runs that are on this disk."""
    paths = [path for kind in KINDS for root in experiments.roots(kind) for path in root.rglob("*.yaml")]
    paths += (HOME / "models").glob("*/experiment.yaml")
    paths += (store.artifacts / run.id / "artifacts" / CONFIG for store, run in current if store.server is None)
    for path in paths:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            yield path.read_text(encoding="utf-8")


def _referenced(texts: Iterable[str]) -> Iterator[str]:
    """Names of the experiments that take weights, each once."""
    yield from dict.fromkeys(name for text in texts for name in REFERENCE.findall(text))


def _paths() -> Iterator[str]:
    """Experiments by path whose models are here."""
    for model in (HOME / "models").glob("*/"):
        name = _origin(model)[0] or ""
        if Path(stages.split(name)[0]).suffix in (".yaml", ".yml"):
            yield name


def _hashes(names: Iterable[str]) -> tuple[set[str], dict[str, object]]:
    """The models of experiments and of those that they need, and the data of those that have no hash now."""
    hashes, unknown = set[str](), dict[str, object]()
    left, finished = [*dict.fromkeys(names)], set[str]()
    while left:
        if (name := left.pop()) in finished:
            continue
        finished.add(name)
        config: Config | None = None
        try:
            config = experiments.load(name)
            left += experiments.prerequisites(config)
            hashes.add(hashing.experiment_hash(config))
        except ERRORS:
            unknown[name] = None if config is None else _data(config)
    return hashes, unknown


def _origin(model: Path) -> tuple[str | None, object]:
    """The experiment on the card of a model, None where it has no card, and the data of its configuration."""
    with contextlib.suppress(*ERRORS):
        if (name := weights.card(model / "weights.safetensors").get("experiment")) is not None:
            return str(name), None
    try:
        config = OmegaConf.to_container(OmegaConf.load(model / "experiment.yaml"))
        return None, _data(config) if isinstance(config, dict) else None
    except ERRORS:
        return None, None


def _data(config: object) -> object:
    """The data of an experiment without options that change nothing of the result."""
    assert isinstance(config, dict)
    with contextlib.suppress(*ERRORS):
        return specs.canonical("data", config["data"])
    return None


def _stem(name: str) -> str:
    """The name of an experiment without folders, ending and stage, so that a name equals a path to it."""
    with contextlib.suppress(SpecError):
        name = stages.split(name)[0]
    return Path(name).stem


def _sweeps() -> Iterator[str]:
    """Sweeps that have run in this folder, by the locks that they leave."""
    end = ".sweep.lock"
    for path in (*HOME.glob(f"*{end}"), *HOME.glob(f"*/*{end}")):
        yield path.relative_to(HOME).as_posix().removesuffix(end)
