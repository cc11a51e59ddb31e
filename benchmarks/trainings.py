"""The models of ablations' rows as a list of trainings by priority, and the claims of processes that share the list."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sana_lab.ablation import plan
from sana_lab.ablation.shipping import is_shippable
from sana_lab.checkpoints import weights
from sana_lab.config import experiments, hashing
from sana_lab.config.experiments import merge
from sana_lab.config.schema import Config

SEEDS = (0, 1, 2)
QUICKSTART, PAPER = "quickstart", "paper"
LAST = 1000  # priority of models whose weights ship with the lab


class Model(NamedTuple):
    """One training: a row of an ablation, which other rows may share, or an autoencoder that rows need."""

    name: str  # recipe, row and seed
    seed: int
    hash: str  # folder of its weights: runs/models/HASH
    priority: int  # models of lower numbers are trained first
    needs: list[str]  # hashes of the models whose weights it takes
    config: Config
    others: list[str]  # rows that are the same model

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return int(self.config["trainer"]["max_steps"])


# the list


def recipes() -> list[tuple[str, str | None]]:
    """Recipe and scale: quickstart, and those of the paper's ablations that train."""
    names = [name for name in experiments.available("ablations", PAPER) if not plan.compares_efficiency(name)]
    return [(QUICKSTART, None), *((name, "toy") for name in names)]


def listed(seeds: Sequence[int] = SEEDS, only: Sequence[str] = ()) -> list[Model]:
    """Models of all rows by priority, each once. With `only`, those whose name has one of these texts, and what these
    need."""
    rows: dict[str, Model] = {}
    for recipe, scale in recipes():
        table = plan.load(recipe, scale=scale, retrain=True, seeds=SEEDS if recipe == QUICKSTART else None)
        for trial in table.trials:
            name = f"{recipe}: {trial.label}, seed {trial.seed}"
            if is_shippable(trial) and trial.seed in seeds:
                model = _model(name, trial.seed, trial.config, _priority(recipe, trial.seed))
                rows[model.hash] = _joined(rows.get(model.hash), model)
    chosen = {m.hash: m for m in rows.values() if not only or any(text in m.name for text in only)}
    needed = {m.hash: m for row in chosen.values() for m in _needed(row.config)}
    return sorted([*needed.values(), *chosen.values()], key=lambda model: model.priority)


def _model(name: str, seed: int, config: Config, priority: int) -> Model:
    if weights.shipped(config) is not None:
        priority = LAST
    needs = [m.hash for m in _needed(config)]
    return Model(name, seed, hashing.experiment_hash(config), priority, needs, config, [])


def _priority(recipe: str, seed: int) -> int:
    """Rows of quickstart, seed by seed, and then those of the paper; autoencoders that rows need have priority 1."""
    return 2 * seed if recipe == QUICKSTART else 100 + seed


def _joined(first: Model | None, model: Model) -> Model:
    """The model of the first row, with the names of later ones."""
    return model if first is None else first._replace(others=[*first.others, model.name])


def _needed(config: Config) -> Iterator[Model]:
    """Experiments without weights that a row takes weights from."""
    for name in experiments.prerequisites(config):
        experiment = experiments.load(name)
        if weights.shipped(experiment) is None:
            yield Model(name, experiment["seed"], hashing.experiment_hash(experiment), 1, [], experiment, [])


# how a model is trained here: options that leave its hash as it is


def placed(config: Config, device: str, compiled: bool) -> Config:
    """The experiment on this device: validated once, at the end, and without samples on the way.

    On CUDA texts are padded to one length, so that compiled blocks have one shape.
    """
    steps = config["trainer"]["max_steps"]
    often = {"validate_every": steps, "checkpoint_every": max(1, steps // 4), "compile": compiled}
    changes: Config = {"trainer": {**often, "accelerator": device, "devices": 1, "threads": 1}, "prompts": []}
    changes["eval"] = {"at": [], "every": None}
    if device == "cuda" and "pad_to_max" in config["system"].get("text_encoder", {}):
        changes["system"] = {"text_encoder": {"pad_to_max": True}}
    return dict(merge(config, changes))


def rehearsed(config: Config, steps: int, home: Path) -> Config:
    """The experiment with few steps on few items, with its own cache: another model, of another hash."""
    changes: Config = {"trainer": {"max_steps": steps}, "system": {"warmup": 2}}
    if config["data"]["name"] == "latents":
        changes["data"] = {"items": 2 * config["data"]["batch"], "cache": str(home / "latents")}
        changes["data"]["source"] = {"held_out": config["data"]["batch"]}
    return dict(merge(config, changes))


# claims


class Board:
    """Claims and ends of models as files in a folder, which several processes share."""

    def __init__(self, folder: Path, models: Sequence[Model]) -> None:
        self.folder, self.models = folder, models

    def claim(self, worker: str) -> Model | None:
        """The first model that nobody has and that needs no model in training; None if there is none now."""
        return next((m for m in self.models if self._is_ready(m) and self._take(m, worker)), None)

    def unclaimed(self) -> list[Model]:
        """Models that nobody has begun."""
        return [m for m in self.models if not self._claim_of(m).exists()]

    def can_claim(self) -> bool:
        """Whether some model may be claimed now."""
        return any(self._is_ready(m) for m in self.unclaimed())

    def end(self, model: Model, trained: bool) -> None:
        """Record that a model's training has ended."""
        self._end_of(model).write_text(json.dumps(trained))

    def is_trained(self, key: str) -> bool | None:
        """Whether a model was trained; None before its end."""
        path = self.folder / f"{key}.end"
        return json.loads(path.read_text() or "null") if path.exists() else None

    def close(self, worker: str) -> None:
        """End what the worker's process before this one had claimed, when it was stopped."""
        for model in self.models:
            claim = self._claim_of(model)
            if claim.exists() and claim.read_text() == worker and not self._end_of(model).exists():
                self.end(model, False)

    def _is_ready(self, model: Model) -> bool:
        return all(self.is_trained(key) is not None for key in model.needs)

    def _take(self, model: Model, worker: str) -> bool:
        try:
            with self._claim_of(model).open("x") as file:
                file.write(worker)
        except FileExistsError:
            return False
        return True

    def _claim_of(self, model: Model) -> Path:
        return self.folder / f"{model.hash}.claim"

    def _end_of(self, model: Model) -> Path:
        return self.folder / f"{model.hash}.end"


def write(path: Path, models: Sequence[Model]) -> None:
    """The list as JSON."""
    path.write_text(json.dumps([model._asdict() for model in models]))


def read(path: Path) -> list[Model]:
    """The list of a file."""
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    return [Model(**row) for row in rows]
