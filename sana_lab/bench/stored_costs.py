"""MACs and activations of training steps that an earlier command counted, in runs/costs.json.

Counting runs a step on the meta device: half a second or more for each different network. An entry is of the network's
resolved options and shapes, of the files of this package that the numbers depend on, and of the version of torch.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sana_lab
from sana_lab.checkpoints import weights
from sana_lab.config.atomic_write import write_text
from sana_lab.config.memo import reuse

FILE = "costs.json"
"""In the folder of runs."""

MOST = 2000
"""Most entries; the oldest are dropped."""

PACKAGES = ("bench", "costs", "models", "ops")
"""Packages whose files the numbers depend on."""

LIBRARIES = ("sana_lab", "torch", "transformers")
"""Whose modules a network may have: a module of the user's own may change at any time, and is counted anew."""


def recall(network: nn.Module, key: tuple[Any, ...], count: Callable[[], tuple[int, int]]) -> tuple[int, int]:
    """The stored numbers of a key of plain data, or those that `count` gives, which are then stored."""
    if any(type(module).__module__.partition(".")[0] not in LIBRARIES for module in network.modules()):
        return count()
    name = hashlib.sha256(json.dumps([key, code()], default=repr).encode()).hexdigest()[:32]
    stored = read(path := weights.HOME / FILE)
    if name not in stored:
        stored[name] = count()
        if weights.HOME.is_dir():
            with suppress(OSError):  # a folder that cannot be written
                write_text(path, json.dumps(dict([*stored.items()][-MOST:])))
    macs, activations = stored[name]
    return macs, activations


def read(path: Path) -> dict[str, tuple[int, int]]:
    """The entries of a file; those that are no two numbers are left out."""
    try:
        stored = json.loads(path.read_text())
        return {name: (int(macs), int(bytes_)) for name, (macs, bytes_) in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError):  # none yet, or damaged
        return {}


def code() -> str:
    """A digest of sizes and times of change of the package's files, and the version of torch."""
    return reuse(("code of costs",), _code)


def _code() -> str:
    root = Path(str(sana_lab.__file__)).parent
    files = sorted(path for name in PACKAGES for path in (root / name).rglob("*.py"))
    stats = [(str(path.relative_to(root)), (s := path.stat()).st_size, s.st_mtime_ns) for path in files]
    return hashlib.sha256(repr([torch.__version__, stats]).encode()).hexdigest()
