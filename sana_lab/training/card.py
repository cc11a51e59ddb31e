"""The card of a weights file: what trained it, how long, on what, and what was measured on the way."""

import shlex
import sys
import time
from pathlib import Path
from typing import Any

from sana_lab import environment
from sana_lab.config import hashing, interpolation
from sana_lab.config.schema import Config


def card(
    experiment: Config, name: str, seconds: float, metrics: dict[str, float], steps: int, devices: int = 1
) -> dict[str, Any]:
    """Metadata of a weights file about its training, which took `steps` optimiser steps, the last on `devices`."""
    command = shlex.join(["sana-lab", *sys.argv[1:]]) if Path(sys.argv[0]).stem in ("sana-lab", "__main__") else None
    return {
        "experiment": name,
        "hash": hashing.experiment_hash(experiment),
        "config": interpolation.as_written(experiment),
        "command": command,
        "seed": experiment["seed"],
        "steps": steps,
        "samples": samples(experiment, steps),
        "seconds": round(seconds, 1),
        "devices": devices,
        "date": time.strftime("%Y-%m-%d"),
        "measured": metrics,
        "environment": environment.environment(),
        **budget(experiment["trainer"]["max_seconds"]),
    }


def samples(experiment: Config, steps: int) -> int | None:
    """Training images, each as often as it was in a batch; None for data without batches."""
    batch = experiment["data"].get("batch")
    return None if batch is None else steps * batch * experiment["trainer"]["accumulate"]


def budget(seconds: float | None) -> dict[str, Any]:
    """What a card says of a training within a time."""
    if seconds is None:
        return {}
    note = "ended by time: another machine takes another number of steps; the rate decayed over the last of the time"
    return {"max_seconds": seconds, "ended_by": note}
