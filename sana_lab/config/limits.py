"""Ranges of numbers, and files and folders, of an experiment's `trainer:` and `eval:`, checked before any work."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sana_lab.config.specs import SpecError, nearest

TRAINER_MINIMA = {
    "max_steps": 0,
    "gradient_clip": 0,
    "accumulate": 1,
    "threads": 1,
    "log_every": 1,
    "validate_every": 1,
    "checkpoint_every": 1,
}
EVALUATION_RANGES = {
    "prompts_per_task": (1, 100_000),
    "images_per_prompt": (1, 10_000),
    "batch": (1, 65_536),
    "seed": (0, 2**63 - 1),
    "reconstructions": (1, 10_000_000),
    "bench_size": (1, 65_536),
    "bench_batch": (1, 65_536),
    "bench_repeats": (1, 100_000),
    "bench_steps": (1, 100_000),
    "held_out": (1, 10_000_000),
    "worst": (0, 10_000),
}
"""Smallest and largest value of each option of `eval:`, and of options of its measures with the same names."""

FOLDERS = ("captions", "reconstruction_folder")
"""Options of `eval:` that name a folder; those that end in `_weights` name a file."""


def check_trainer(options: Mapping[str, Any]) -> None:
    """SpecError for a number out of range or malformed devices."""
    _check_minima("trainer", options, TRAINER_MINIMA)
    devices = options["devices"]
    is_list = isinstance(devices, str) and (devices == "auto" or devices.replace(",", "").isdigit())
    if not is_list and (isinstance(devices, str) or devices < 1):
        raise SpecError(f"trainer.devices is {devices!r}, expected auto, a number of at least 1, or a list such as 0,1")


def check_evaluation(options: Mapping[str, Any]) -> None:
    """SpecError for a number out of range, or a missing file or folder."""
    check_evaluation_numbers(options)
    for key, value in options.items():
        if key.endswith("_weights") and value is not None and not Path(value).expanduser().is_file():
            raise SpecError(f"eval.{key} is {value!r}, which is no file here; {_nearest_file(value)}")
        if key in FOLDERS and value is not None and not Path(value).expanduser().is_dir():
            raise SpecError(f"eval.{key} is {value!r}, which is no folder here; {_nearest_file(value)}")


def check_evaluation_numbers(options: Mapping[str, Any]) -> None:
    """SpecError for a number out of range, of `eval:` or of one of the lab's measures in it."""
    _check_ranges("eval", options)
    for measure in options["measures"]:
        if isinstance(measure, dict) and ":" not in measure["name"]:
            _check_ranges(f"eval.measures: {measure['name']}", measure)


def _check_ranges(title: str, options: Mapping[str, Any]) -> None:
    for key, (least, most) in EVALUATION_RANGES.items():
        value = options.get(key)
        if isinstance(value, int | float) and not least <= value <= most:
            bound, expected = (least, "at least") if value < least else (most, "at most")
            raise SpecError(f"{title}.{key} is {value}, expected {expected} {bound}; the nearest is {bound}")


def _check_minima(title: str, options: Mapping[str, Any], minima: Mapping[str, int]) -> None:
    for key in minima.keys() & options.keys():
        if options[key] is not None and options[key] < minima[key]:
            raise SpecError(
                f"{title}.{key} is {options[key]}, expected at least {minima[key]}; the nearest is {minima[key]}"
            )


def _nearest_file(value: str) -> str:
    path = Path(value).expanduser()
    return nearest(path.name, (p.name for p in path.parent.glob("*")))
