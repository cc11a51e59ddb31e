"""Where a training step makes the host wait for the device, found without one: on the meta device.

Tensors there have no values, so whatever asks for one is seen: on a GPU the host would wait there until all work that
was queued before is done.
"""

import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sana_lab.types import Batch

READS = ("_local_scalar_dense", "equal", "is_nonzero")
"""Operators that hand one value to the host: `.item()`, `float()`, `bool()`, `torch.equal`."""

SHAPES = ("nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive", "bincount")
"""Operators whose result has a size that depends on values."""

PACKAGE = f"{Path(__file__).parents[1]}/"


class Syncs(TorchDispatchMode):
    """Counts, by operator and place, what waits for tensors that are not on the CPU, and copies that block.

    On the meta device it gives a stand-in for the value (one), so that the program goes on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if why := _waits(name, args, kwargs):
            self.found[f"{why} at {_place()}"] += 1
            if any(t.is_meta for t in _tensors((args, kwargs))):
                return _stand_in(name, func, args, kwargs)
        return func(*args, **kwargs)

    @property
    def total(self) -> int:
        return self.found.total()


def _tensors(values: Any) -> list[Tensor]:
    return [v for v in tree_leaves(values) if isinstance(v, Tensor)]


def _waits(name: str, args: Any, kwargs: Any) -> str | None:
    """Why the host waits in this call, in words; None where it does not."""
    far = [t for t in _tensors((args, kwargs)) if t.device.type != "cpu"]
    if name in (*READS, *SHAPES) and far:
        return name
    if name == "index" and far and any(t.dtype in (torch.bool, torch.uint8) for t in _tensors(args[1])):
        return "index by a mask"
    if name in ("_to_copy", "copy_"):
        return _copy(name, args, kwargs)
    return None


def _copy(name: str, args: Any, kwargs: Any) -> str | None:
    """A copy between host and device that is not queued (`non_blocking`)."""
    source, target = (args[1], args[0].device) if name == "copy_" else (args[0], kwargs.get("device"))
    queued = kwargs.get("non_blocking", False) or (name == "copy_" and len(args) > 2 and args[2])
    here, there = source.device.type == "cpu", target is None or torch.device(target).type == "cpu"
    if target is None or here == there or queued:
        return None
    return "copy to the device" if here else "copy to the host"


def _stand_in(name: str, func: Any, args: Any, kwargs: Any) -> Any:
    if name in READS:
        dtype = args[0].dtype if name == "_local_scalar_dense" else torch.bool
        return torch.ones((), dtype=dtype, device="cpu").tolist()
    if name == "_to_copy" and torch.device(kwargs["device"]).type == "cpu":
        return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device="cpu")
    return func(*args, **kwargs)


def _place() -> str:
    """The innermost line of this package on the stack, or of whoever called."""
    frames = [f for f, _ in traceback.walk_stack(None) if f.f_code.co_filename != __file__]
    ours = [f for f in frames if f.f_code.co_filename.startswith(PACKAGE)]
    others = [f for f in frames if "/torch/" not in f.f_code.co_filename]
    first = (ours or others or frames)[0]
    path = first.f_code.co_filename
    return f"{path.removeprefix(PACKAGE) if first in ours else Path(path).name}:{first.f_lineno}"


class _Nowhere(CPUAccelerator):
    """Lets a strategy put a module on the meta device."""

    def setup_device(self, device: torch.device) -> None:
        """Nothing is there to set up."""


class _Given(L.LightningDataModule):
    """Batches without a length, which Lightning would ask the meta device about."""

    def __init__(self, batches: list[Batch]) -> None:
        super().__init__()
        self.batches = batches

    def train_dataloader(self) -> "_Given":
        return self

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


class _Counting(Callback):
    """What had been counted at the end of each batch."""

    def __init__(self) -> None:
        self.mode = Syncs()
        self.steps: list[Counter[str]] = []

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        """The fused kernels, which ask for no value, do not run on the meta device."""
        for group in (g for optimizer in trainer.optimizers for g in optimizer.param_groups):
            if group.get("fused"):
                group["fused"] = False

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps.append(self.mode.found.copy())


def syncs(
    system: L.LightningModule, batches: Iterable[Batch], clip: float = 1.0, callbacks: Sequence[Callback] = ()
) -> list[Counter[str]]:
    """What each training step of a system waits for, from the end of one to the end of the next: of n batches n - 1.

    The first step, which sets up what all share, is left out, and so are logging points and validation. The system is
    of no use afterwards: it is moved to the meta device. `batches` are on the CPU.
    """
    given = list(batches)
    counting = _Counting()
    trainer = L.Trainer(
        strategy=SingleDeviceStrategy(torch.device("meta"), accelerator=_Nowhere()),
        max_steps=len(given) + 1,  # the last step of a training is looked at
        max_epochs=1,
        gradient_clip_val=clip if system.automatic_optimization else None,
        log_every_n_steps=sys.maxsize,
        callbacks=[*callbacks, counting],
        enable_progress_bar=any(isinstance(c, ProgressBar) for c in callbacks),
        logger=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    with counting.mode, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no validation, no workers: there is nothing to validate or to load
        trainer.fit(system, datamodule=_Given(given))
    return [after - before for before, after in zip(counting.steps, counting.steps[1:], strict=False)]
