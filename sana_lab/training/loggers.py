"""Lightning's own loggers by name (`trainer.logger`), which record curves beside MLflow, in the model's folder."""

import importlib.util
from pathlib import Path

from lightning.pytorch import loggers
from lightning.pytorch.loggers import Logger

from sana_lab.config.specs import SpecError

PACKAGES: dict[str, tuple[str, ...]] = {"csv": (), "tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
"""Name -> packages of which it needs one."""


def names(option: str | list[str] | None) -> list[str]:
    """The names of `trainer.logger`, each once."""
    return list(dict.fromkeys([option] if isinstance(option, str) else option or []))


def check(option: str | list[str] | None) -> None:
    """SpecError for a logger whose package is not installed."""
    for name in names(option):
        needed = PACKAGES[name]
        if needed and not any(map(importlib.util.find_spec, needed)):
            raise SpecError(f"trainer.logger {name!r} needs the package {needed[0]}: pip install {needed[0]}")


def build(option: str | list[str] | None, home: Path) -> list[Logger]:
    """The loggers of a model whose folder is `home`: home/csv, home/tensorboard, home/wandb (offline).

    A resumed training begins another folder csv/version_N, and another file of the same folder for TensorBoard.
    """
    return [_build(name, home) for name in names(option)]


def _build(name: str, home: Path) -> Logger:
    if name == "csv":
        return loggers.CSVLogger(save_dir=home, name=name)
    if name == "tensorboard":
        return loggers.TensorBoardLogger(save_dir=home, name=name, version="")
    return loggers.WandbLogger(project="sana_lab", name=home.name, id=home.name, save_dir=home, offline=True)
