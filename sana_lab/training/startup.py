"""Start of a command: torchmetrics without what Lightning does not use of it.

Lightning imports torchmetrics for two classes. Its `__init__` imports every metric, and with them scipy.signal,
torchvision.models and transformers: a third of the time of a dry run. Here it runs when something asks for more. This
is for processes of the command line: an `import sana_lab` changes nothing.
"""

import importlib
import logging
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

NEEDED = {"Metric": "torchmetrics.metric", "MetricCollection": "torchmetrics.collections"}
"""What Lightning imports of torchmetrics, and the module that defines it."""


def defer_torchmetrics() -> None:
    """Let the next `import torchmetrics` run its code when a name is asked for that is not in `NEEDED`; a process that
    has imported it keeps what it has."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds torchmetrics where it is, with the loader below."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname == "torchmetrics" else None
        if spec is not None and spec.loader is not None:
            spec.loader = _Later(spec.loader)
        return spec


class _Later(Loader):
    """Runs the code of a module at the first use of a name that is not in `NEEDED`."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def exec_module(self, module: ModuleType) -> None:
        """Give the module an attribute hook instead of its attributes."""

        def attribute(name: str) -> Any:
            if name in NEEDED:
                importlib.import_module("torchmetrics.utilities")  # before torchmetrics.metric, which it imports
                return getattr(importlib.import_module(NEEDED[name]), name)
            if name.startswith("__"):  # asked for by the import system and by inspection
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            del module.__dict__["__getattr__"]
            self.loader.exec_module(module)
            return getattr(module, name)

        module.__dict__.update(__getattr__=attribute, _logger=logging.getLogger("torchmetrics"))
