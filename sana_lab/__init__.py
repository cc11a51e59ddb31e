"""sana_lab: take SANA apart, one idea at a time. `from sana_lab import build, evaluate, load, sample`."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sana_lab.api import load, sample
    from sana_lab.checkpoints.build import build
    from sana_lab.evaluation.evaluate import evaluate

__all__ = ["build", "evaluate", "load", "sample"]
_HOMES = {"build": "checkpoints.build", "evaluate": "evaluation.evaluate", "load": "api", "sample": "api"}


def __getattr__(name: str) -> Any:
    """The four functions for notebooks, imported when they are first asked for."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"sana_lab.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'sana_lab' has no attribute {name!r}")
