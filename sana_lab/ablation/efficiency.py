"""Trials of kind efficiency: a probe is counted from its shapes and, if a device is available, timed."""

import hashlib
import json
import socket
from typing import NamedTuple, cast

import torch

from sana_lab.bench.probes import Probe, ProbeSettings
from sana_lab.bench.record import device_name
from sana_lab.config import specs
from sana_lab.config.schema import Ablation, Config, EfficiencyTable, Trial
from sana_lab.costs.out_of_memory import is_out_of_memory, release_memory

UNMEASURED = "sana.unmeasured"
"""Tag of a run that was counted and could not be timed; its value is the reason."""


TIMED_ON = "sana.timed_on"
"""Tag of a run that was timed: the device."""


class Target(NamedTuple):
    """What the rows of a table are timed on."""

    device: str  # of torch
    name: str  # in the trial's key: of this machine's device, or only its kind on another machine


def target_of(table: EfficiencyTable | Ablation, elsewhere: int | None) -> Target | None:
    """Of this machine, or of another one whose worker has `elsewhere` CUDA devices; None if rows are only counted."""
    if elsewhere is None:
        device = device_of(table)
        return None if device is None else Target(str(device), device_name(device))
    if elsewhere:
        return Target("cuda", "a CUDA device of the executor")
    return None if isinstance(table, Ablation) or table.gpu else Target("cpu", "a CPU of the executor")


def device_of(table: EfficiencyTable | Ablation) -> torch.device | None:
    """The device of this machine that a table's rows are timed on; None if they are only counted."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return None if isinstance(table, Ablation) or table.gpu else torch.device("cpu")


def device_words(target: Target | None) -> str:
    return f"timed on {target.name}" if target else "counted only, because there is no CUDA device"


def trial_hash(trial: Trial, device: str | None) -> str:
    """The name of a finished trial: all options of its probe, including those that change only speed, the name of the
    device that timed it, and by content the files that it names and the experiment whose image it times."""
    from sana_lab.config import experiments, hashing

    settings = {"row": hashing.with_contents(trial.config), "on": device}
    if name := trial.config["probe"].get("experiment"):
        experiment = experiments.load(name)
        settings |= {part: hashing.with_contents(experiment[part]) for part in ("system", "sampling")}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def build_probe(config: Config) -> Probe:
    """The probe of a trial; nothing is allocated."""
    return cast(Probe, specs.build("probe", config["probe"]))


def open_device(name: str | None) -> torch.device | None:
    """The device of a job's probes. ValueError for a CUDA device that this machine, the worker's, does not have."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{socket.gethostname()} has no CUDA device to time on; expected other executor options")
    return None if name is None else torch.device(name)


def run_probe(config: Config, device: torch.device | None) -> tuple[dict[str, float], str | None]:
    """Metrics of a trial, and the reason if it could not be timed because it exceeds the memory."""
    probe = build_probe(config)
    counts = probe.count()
    if device is None:
        return counts, None
    try:
        return {**counts, **probe.measure(ProbeSettings(device, config["repeats"], config["warmup"]))}, None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return counts, f"out of memory: {next(iter(str(error).splitlines()), type(error).__name__)}"
    finally:
        release_memory()
