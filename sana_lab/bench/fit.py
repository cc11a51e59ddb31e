"""Whether trainings fit this machine: the memory of those that run at a time, and the disk that all of them fill."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from sana_lab.checkpoints import weights
from sana_lab.config import specs
from sana_lab.config.memo import reuse
from sana_lab.config.schema import Config
from sana_lab.config.specs import SpecError
from sana_lab.costs.too_large import GIB, device_memory, host_memory
from sana_lab.data import DataModule

if TYPE_CHECKING:
    from sana_lab.bench.training_cost import TrainingCost

CLEARLY = 1.5
"""Ratio of the computed memory to the machine's from which a training is refused. What is computed is an upper bound;
a smaller excess may fit, also by swap."""

OVERRIDE = "--force begins all the same"


class Training(NamedTuple):
    """A training that is to be done."""

    title: str
    cost: "TrainingCost"
    data: Config
    stored: int = 0  # bytes of its checkpoints from before an interruption


class Problem(NamedTuple):
    """Something that does not fit, in a sentence with what is needed, what there is and what would fit."""

    text: str
    refused: bool


def check(trainings: Sequence[Training], together: int = 1) -> None:
    """SpecError for trainings, so many at a time, that clearly need more memory or disk than this machine has."""
    for problem in problems(trainings, together):
        if problem.refused:
            raise SpecError(f"{problem.text}; {OVERRIDE}")


def lines(trainings: Sequence[Training], together: int = 1) -> list[str]:
    """The disk that trainings take, and what does not fit, for dry runs."""
    if not trainings:
        return []
    disk = disk_line(bytes_to_write(trainings, together))
    return [disk, *(_dry(problem) for problem in problems(trainings, together))]


def _dry(problem: Problem) -> str:
    if problem.refused:
        return f"does not fit this machine: {problem.text}; {OVERRIDE}"
    return f"may not fit this machine: {problem.text}"


def problems(trainings: Sequence[Training], together: int = 1) -> list[Problem]:
    """What does not fit: the memory of the largest trainings, and the disk of all."""
    if not trainings:
        return []
    largest = sorted(trainings, key=lambda t: t.cost.memory - t.cost.stages.process, reverse=True)[:together]
    title = trainings[0].title if len(trainings) == 1 else f"{len(trainings)} trainings"
    memory = memory_problem([training.cost for training in largest], largest[0].title)
    return [p for p in (memory, disk_problem(bytes_to_write(trainings, together), title)) if p is not None]


# memory


def needed_memory(costs: "Sequence[TrainingCost]") -> int:
    """Bytes of trainings at a time, the largest first: on a CPU of all their processes, which share the pages of
    libraries; else of those that share a GPU."""
    if process := costs[0].stages.process:
        return process + sum((cost.memory - cost.stages.process) * cost.devices for cost in costs)
    sharing = math.ceil(sum(cost.devices for cost in costs) / max(1, torch.cuda.device_count()))
    return sum(cost.memory for cost in costs[:sharing])


def memory_problem(costs: "Sequence[TrainingCost]", title: str, memory: int | None = None) -> Problem | None:
    """Trainings at a time that need more than the bytes of the machine, or of its smallest GPU where they train on
    GPUs; None where they fit. The first is the largest, with this title."""
    cost, together = costs[0], len(costs)
    available = (host_memory() if cost.stages.process else device_memory()) if memory is None else memory
    needed = needed_memory(costs)
    if needed <= available:
        return None
    several = f", with {together} trainings at a time" if together > 1 else ""
    several = f" on {cost.devices} devices{several}" if cost.devices > 1 else several
    return Problem(
        f"{title} needs {needed / GIB:.1f} GiB at data.batch {cost.batch * cost.devices}{several}, "
        f"{cost.fixed / GIB:.1f} GiB of them at any batch, and there are {available / GIB:.1f} GiB; what would fit: "
        f"{remedy(costs, available)}",
        needed > CLEARLY * available,
    )


def remedy(costs: "Sequence[TrainingCost]", memory: int) -> str:
    """What trainings that do not fit could have less of."""
    fewer = next((n for n in range(len(costs) - 1, 0, -1) if needed_memory(costs[:n]) <= memory), None)
    if fewer is not None:
        return f"--workers {fewer}"
    cost, stages = costs[0], costs[0].stages
    if stages.encoding and stages.process + stages.encoding > memory:
        return "a smaller `tile` of the autoencoder that encodes the data"
    sharing = cost.devices if stages.process else 1
    left = memory - stages.process - sharing * stages.state
    batch = int(left * cost.batch / (sharing * stages.step)) * cost.devices if stages.step and left > 0 else 0
    alone = "--workers 1 and " if len(costs) > 1 else ""
    return f"{alone}data.batch={batch} with trainer.accumulate" if batch else "a smaller system, or more devices"


# disk


def bytes_to_write(trainings: Sequence[Training], together: int = 1) -> dict[Path, int]:
    """Bytes by folder: of runs, for weights and a checkpoint of each training and a second one while it trains; and of
    each cache, as far as its size is known, what is not encoded yet."""
    checkpoints = sorted((training.cost.checkpoint for training in trainings), reverse=True)
    models = sum(max(0, t.cost.disk - t.cost.checkpoint - t.stored) for t in trainings)
    sizes = {weights.HOME: models + sum(checkpoints[:together])}
    for training in trainings:
        for folder, size in caches(training.data).items():
            sizes[folder] = max(size, sizes.get(folder, 0))
    return sizes


def caches(data: Config) -> dict[Path, int]:
    """Bytes that a data set has yet to encode, by folder; none where its files or encoders are away."""
    return reuse(("cache", data), lambda: _caches(data))


def _caches(data: Config) -> dict[Path, int]:
    try:
        module: DataModule = specs.build("data", data)
        return module.bytes_to_write()
    except (ValueError, OSError, ImportError, RuntimeError, LookupError):
        return {}


def disk_line(sizes: dict[Path, int]) -> str:
    """What is written, against what is free."""
    encoded = sum(size for folder, size in sizes.items() if folder != weights.HOME)
    words = f", caches to encode at least {encoded / GIB:.2f}" if encoded else ""
    free = ", ".join(f"{free_bytes(f) / GIB:.1f} free in {f}" for f in _by_disk(sizes))
    return f"disk in GiB: checkpoints and weights {sizes[weights.HOME] / GIB:.2f}{words}; {free}"


def disk_problem(sizes: dict[Path, int], title: str) -> Problem | None:
    """The first disk that has less room than is written there."""
    for folder, each in _by_disk(sizes).items():
        needed, free = sum(each.values()), free_bytes(folder)
        if needed > free:
            encoded = needed - each.get(weights.HOME, 0)
            of_it = f", at least {encoded / GIB:.1f} GiB of them caches" if encoded else ""
            fits = "`cache` of the data on another disk, fewer pictures" if 2 * encoded > needed else "a smaller system"
            return Problem(
                f"{title} writes {needed / GIB:.1f} GiB{of_it}, and {free / GIB:.1f} GiB are free in {folder}; what "
                f"would fit: {fits}, or a disk with more room (sana-lab du shows what could go)",
                refused=True,
            )
    return None


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder, which may not exist yet."""
    return shutil.disk_usage(_existing(folder)).free


def _by_disk(sizes: dict[Path, int]) -> dict[Path, dict[Path, int]]:
    """Sizes by folder, grouped by disk under the first folder of each."""
    disks: dict[int, Path] = {}
    groups: dict[Path, dict[Path, int]] = {}
    for folder, size in sizes.items():
        first = disks.setdefault(_existing(folder).stat().st_dev, folder)
        groups.setdefault(first, {})[folder] = size
    return groups


def _existing(folder: Path) -> Path:
    whole = folder.absolute()
    return next(path for path in (whole, *whole.parents) if path.is_dir())
