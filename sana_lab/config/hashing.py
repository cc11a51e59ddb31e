"""Hashes that name trained models and finished trials."""

import hashlib
import json
from pathlib import Path
from typing import Any

from sana_lab.config import digests, specs
from sana_lab.config.experiments import load
from sana_lab.config.schema import Config, EvaluationOptions, SamplingOptions, TrainerOptions, Trial
from sana_lab.config.specs import AsBefore

REFERENCES = ("weights", "model", "lpips_weights")
"""Options that may name a file or folder of other people's; beside them, anything that says `file:PATH`."""


def experiment_hash(config: Config) -> str:
    """The name of what this experiment trains: 16 hex digits over system, data, trainer and seed, resolved."""
    return _digest(_canonical(config))


def trial_hash(trial: Trial) -> str:
    """The name of a finished trial: what was trained, and how it was sampled and judged."""
    rest = {k: trial.config[k] for k in ("sampling", "eval", "prompts")}
    rest["sampling"] = _without_later(SamplingOptions, rest["sampling"])
    rest["eval"] = _without_later(EvaluationOptions, rest["eval"])
    return _digest({"model": experiment_hash(trial.config), **rest})


def _canonical(config: Config) -> Config:
    trainer = specs.fields(TrainerOptions)
    kept = {k: v for k, v in config["trainer"].items() if not trainer[k].marks(specs.Runtime)}
    system = _with_hashes(specs.canonical("system", config["system"]))
    data = _with_hashes(specs.canonical("data", config["data"]))
    return {
        "system": system,
        "data": data,
        "content": _content(config["data"]),
        "trainer": kept,
        "seed": config["seed"],
    }


def _without_later(record: type, values: Config) -> Config:
    """Without options added later at their as-before value, so that earlier trials keep their key; runtime ones too."""
    kept = {k: o for k, o in specs.fields(record).items() if not o.marks(specs.Runtime)}
    return {k: v for k, v in values.items() if k in kept and not any(m.value == v for m in kept[k].marks(AsBefore))}


def _content(data: Config) -> str:
    """The digest of a data set's content; files may change under one name.

    Of data made from other data it is that of the first source: what is made of it follows, and need not be made.
    """
    while "source" in data:
        data = data["source"]
    return specs.build("data", data).digest()


def _with_hashes(value: Any, key: str = "") -> Any:
    """`experiment:NAME` replaced by that experiment's hash, files and folders by a digest of what they hold, so that
    other numbers under the same name are noticed. Hub ids stay."""
    if isinstance(value, dict):
        return {k: _with_hashes(v, k) for k, v in value.items()}
    if not isinstance(value, str):
        return value
    if value.startswith("experiment:"):
        return "experiment:" + experiment_hash(load(value.removeprefix("experiment:")))
    path = Path(value.removeprefix("file:")).expanduser()
    named = key in REFERENCES or value.startswith("file:")
    return f"content:{digests.content(path)}" if named and path.exists() else value


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
