"""Devices, steps, files and folders of an experiment's `trainer:` and `eval:`, checked before any work."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sana_lab.config.specs import SpecError, nearest

FOLDERS = ("captions", "reconstruction_folder")
"""Options of `eval:` that name a folder; those that end in `_weights` name a file."""


def check_trainer(options: Mapping[str, Any]) -> None:
    """SpecError for malformed devices."""
    devices = options["devices"]
    is_list = isinstance(devices, str) and (devices == "auto" or devices.replace(",", "").isdigit())
    if not is_list and (isinstance(devices, str) or devices < 1):
        raise SpecError(f"trainer.devices is {devices!r}, expected auto, a number of at least 1, or a list such as 0,1")


def check_evaluation(options: Mapping[str, Any]) -> None:
    """SpecError for a missing file or folder."""
    for key, value in options.items():
        if key.endswith("_weights") and value is not None and not Path(value).expanduser().is_file():
            raise SpecError(f"eval.{key} is {value!r}, which is no file here; {_nearest_file(value)}")
        if key in FOLDERS and value is not None and not Path(value).expanduser().is_dir():
            raise SpecError(f"eval.{key} is {value!r}, which is no folder here; {_nearest_file(value)}")


def point_steps(experiment: Mapping[str, Any]) -> list[int]:
    """The optimiser steps of the points of `eval.at` and `eval.every`, ascending. SpecError for one beyond the last."""
    options, last = experiment["eval"], experiment["trainer"]["max_steps"]
    every = options["every"]
    if last and every and every > last:
        raise SpecError(f"eval.every is {every}, and trainer.max_steps {last}; expected at most as many")
    if options["at"] and experiment["trainer"]["max_seconds"]:
        raise SpecError(
            "eval.at gives shares of the steps, and trainer.max_seconds leaves their number open; expected eval.every"
        )
    shares = {max(1, round(share * last)) for share in options["at"]}
    return sorted(shares | set(range(every, last + 1, every) if every else ())) if last else []


def _nearest_file(value: str) -> str:
    path = Path(value).expanduser()
    return nearest(path.name, (p.name for p in path.parent.glob("*")))
