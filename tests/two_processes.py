"""Trainings in two processes that share each batch, several of them in one start: a start takes longer than they do."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import tiny
import torch
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import save_file

from sana_lab.checkpoints import weights
from sana_lab.config import experiments
from sana_lab.evaluation.points import Evaluation
from sana_lab.training import callbacks, ranks, train

CACHED = f"""
system:
  name: dit
  dit: {{name: sana, dim: 32, depth: 2, cross_heads: 2}}
  autoencoder: {tiny.VAE}
  text_encoder: {tiny.T5}
  warmup: 2
  ema: 0.9
data:
  name: features
  source:
    name: latents
    source: {{name: shapes, size: 32, held_out: 4}}
    items: 12
    shard: 2
    autoencoder: {{weights: vae.safetensors, {str(tiny.VAE)[1:]}
  text_encoder: {{weights: t5.safetensors, {str(tiny.T5)[1:]}
  batch: 4
  shard: 4
trainer: {{max_steps: 7, accelerator: cpu, threads: 1, log_every: 1, validate_every: 3, checkpoint_every: 1}}
"""
"""The DiT alone on 12 cached items, three batches in an epoch."""


MEASURED = {
    "system.train_text": False,
    "system.dit.depth": 2,
    "data.held_out": 16,
    "eval.held_out": 16,
    "eval.at": [0.5, 1],
    "eval.at_images": 5,
    "eval.batch": 2,
    "eval.measures": [{"name": "distances", "extractor": "shapes"}],
}
"""Changes of the tiny experiment: previews, and points of curves on 5 images, of which two processes have 3 and 2."""


class Case(NamedTuple):
    """A training in a folder of results of its own."""

    experiment: str
    overrides: Sequence[str] = ()
    stops: Sequence[int] = ()  # optimiser steps after which it is interrupted, before it goes on
    waits: int | None = None  # step after which each process writes its number to NAME/waits.PID, and does nothing more
    logged: bool = False  # whether previews are kept, in NAME/pictures.pt


class Interrupted(Exception):
    """An end of a process between two steps, as by SIGKILL: nothing more is written."""


class Pictures(CSVLogger):
    """Keeps the sample grids of a training."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "curves")
        self.file, self.pictures = folder / "pictures.pt", list[torch.Tensor]()

    def log_image(self, key: str, image: Any, step: int) -> None:
        self.pictures.append(torch.from_numpy(np.array(image)))
        torch.save(torch.stack(self.pictures), self.file)


def write(root: Path) -> None:
    """Experiments `tiny` and `cached`, and the weights of frozen parts."""
    tiny.write_experiment(root, changes=MEASURED)
    tiny.write(root, "experiments/cached.yaml", CACHED)
    for kind, spec in (("autoencoder", tiny.VAE), ("text_encoder", tiny.T5)):
        save_file(tiny.build(kind, spec).state_dict(), root / f"{spec['name']}.safetensors")


def train_in_two(root: Path, cases: Mapping[str, Case]) -> None:
    """Train each case in two processes, in root/NAME."""
    ranks.start(2, train_all, str(root), dict(cases), "2")


def train_all(root: str, cases: Mapping[str, Case], devices: str = "1") -> None:
    """Train each case in this process, alone or as one of several, in root/NAME."""
    os.chdir(root)
    torch.set_num_threads(1)
    home, end = weights.HOME, callbacks.Termination.on_train_batch_end
    try:
        for name, case in cases.items():
            weights.HOME = Path(name)
            experiment = experiments.load(case.experiment, [*case.overrides, f"trainer.devices={devices}"])
            for step in case.stops:
                _interrupt(experiment, step)
            _at_batch_end(end if case.waits is None else _waiting(case.waits))
            logger = Pictures(Path(name)) if case.logged and ranks.is_first() else None
            train.train(experiment, progress=_silent, evaluation=Evaluation(), logger=logger)
    finally:
        weights.HOME = home
        _at_batch_end(end)


def _interrupt(experiment: Any, step: int) -> None:
    def stop(self: Any, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == step:
            raise Interrupted

    _at_batch_end(stop)
    try:
        train.train(experiment, progress=_silent)
    except Interrupted:
        return
    raise AssertionError(f"the training was not interrupted at step {step}")


def _at_batch_end(act: Any) -> None:
    """Act after each batch, before its checkpoint, in place of the callback that waits for SIGTERM."""
    callbacks.Termination.on_train_batch_end = act  # type: ignore[method-assign]


def _waiting(step: int) -> Any:
    def wait(self: Any, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == step:
            (weights.HOME / f"waits.{os.getpid()}").touch()
            time.sleep(600)

    return wait


def _silent(*_: object) -> None:
    pass


def checkpoint(root: Path, name: str) -> dict[str, Any]:
    """The last checkpoint of a case: raw weights, optimiser and average."""
    (path,) = (root / name).glob("models/*/*.ckpt")
    state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    return state


def final(root: Path, name: str) -> dict[str, torch.Tensor]:
    """The written weights of a case."""
    (path,) = (root / name).glob("models/*/weights.safetensors")
    return weights.read(path)


def largest_difference(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> float:
    """Over all tensors, which must have the same names."""
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)
