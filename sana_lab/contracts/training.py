"""Contracts of data modules, systems and optimisers."""

import logging
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from sana_lab.config import specs
from sana_lab.contracts import Rule, Subject, expect, expect_shape

DATA: dict[str, Any] = {"name": "shapes", "size": 32, "batch": 4, "held_out": 4}
"""The data that a system trains on while it is checked."""

STEPS = 3


# data


def _turns(data: Any) -> list[tuple[int, int]]:
    return [(i, 0) for i in range(min(3, data.len_train or 3))]


def sizes(subject: Subject) -> None:
    """It says its pixels a side, and how many items it has."""
    data = subject.make()
    expect(isinstance(getattr(data, "size", None), int), "it sets no attribute `size`: pixels a side")
    expect(data.len_train is None or data.len_train > 0, f"len_train is {data.len_train}, expected items to train on")
    expect(data.len_val >= 0, f"len_val is {data.len_val}")


def items(subject: Subject) -> None:
    """Batches hold images (B, 3, size, size) in [-1, 1] or latents, and a caption each."""
    data = subject.make()
    turns = _turns(data)
    batch = data.batch_of(turns, "train")
    expect(len(batch.prompts) == len(turns), f"{len(turns)} items have {len(batch.prompts)} prompts")
    expect(all(isinstance(prompt, str) for prompt in batch.prompts), "a prompt is no text")
    if batch.latents is not None:
        expect(len(batch.latents) == len(turns), f"{len(turns)} items have {len(batch.latents)} latents")
        return
    expect_shape(batch.images, (len(turns), 3, data.size, data.size), "`images` of a batch")
    low, high = float(batch.images.min()), float(batch.images.max())
    expect(low >= -1.001 and high <= 1.001, f"images lie in [{low:g}, {high:g}], expected [-1, 1]")


def repeats(subject: Subject) -> None:
    """An item on the same turn is the same, in any batch and in another process."""
    one, other = subject.make(0), subject.make(1)
    turns = _turns(one)
    first, last = one.batch_of(turns, "train"), other.batch_of(turns[-1:], "train")
    captions = f"{first.prompts[-1]!r} and {last.prompts[0]!r}"
    expect(first.prompts[-1:] == last.prompts, f"an item has the captions {captions}")
    for name in ("images", "latents"):
        if isinstance(value := getattr(first, name), Tensor):
            expect(torch.equal(value[-1:], getattr(last, name)), f"the same item has other {name} the second time")


def held_out(subject: Subject) -> None:
    """Held-out items exist where it says so."""
    data = subject.make()
    if data.len_val:
        expect(len(data.batch_at([data.len_val - 1], "val").prompts) == 1, "the last held-out item has no batch of one")


def content(subject: Subject) -> None:
    """The digest of its content is text, the same every time."""
    one, other = subject.make().digest(), subject.make().digest()
    expect(isinstance(one, str) and bool(one), f"`digest` gives {one!r}, expected text")
    expect(one == other, "`digest` differs between two equal instances, so that every run would train anew")


DATA_MODULE: tuple[Rule, ...] = (sizes, items, repeats, held_out, content)


# systems


def buildable(subject: Subject) -> None:
    """It can be built without memory, and says what it averages and optimises."""
    with torch.device("meta"):
        system = subject.make()
        _quiet()
        system.check()
        system.configure_optimizers()


def trains(subject: Subject) -> None:
    """Three training steps on shapes have finite losses, and every parameter that trains changes."""
    system = subject.make().train()
    before = {n: p.detach().clone() for n, p in system.named_parameters() if p.requires_grad}
    losses = _fit(system)
    bad = next((loss for loss in losses if isinstance(loss, Tensor) and not bool(loss.isfinite().all())), None)
    expect(bad is None, f"the loss is {bad}")
    same = [n for n, p in system.named_parameters() if n in before and torch.equal(p, before[n])]
    expect(not same, f"{', '.join(same[:5])} did not change in {STEPS} steps; remove it or let the loss depend on it")


def weights(subject: Subject) -> None:
    """Its trained weights are averaged, finite, and load into another instance."""
    system = subject.make().train()
    _fit(system)
    trained = system.trained()
    expect(bool(trained), "`trained` gives no weights")
    expect(all(bool(v.isfinite().all()) for v in trained.values()), "`trained` gives weights that are not finite")
    unknown = [key for key in trained if key not in subject.make(1).state_dict()]
    expect(not unknown, f"`trained` gives {', '.join(unknown[:5])}, which another instance does not have")


def _fit(system: Any) -> list[Tensor | None]:
    """The losses of a few steps on the CPU; None from a system that steps by hand."""
    import lightning as L

    class Losses(L.Callback):
        values: list[Tensor | None] = []  # noqa: RUF012 - of this class, which each call makes anew

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.values.append(outputs["loss"] if isinstance(outputs, dict) else outputs)

    _quiet()
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(
            max_steps=STEPS,
            max_epochs=-1,
            accelerator="cpu",
            limit_val_batches=0,
            enable_checkpointing=False,
            callbacks=[Losses()],
            **options,
        )
        trainer.fit(system, datamodule=specs.build("data", DATA))
    return Losses.values


def _quiet() -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


SYSTEM: tuple[Rule, ...] = (buildable, trains, weights)


# optimisers


def descends(subject: Subject) -> None:
    """Thirty steps on a quadratic lower it."""
    torch.manual_seed(0)
    matrix = nn.Parameter(torch.randn(4, 4))
    optimizer = specs.build("optimizer", subject.spec, params=[matrix])
    start = float(matrix.detach().square().sum())
    for _ in range(30):
        optimizer.zero_grad()
        matrix.square().sum().backward()
        optimizer.step()
    end = float(matrix.detach().square().sum())
    expect(end < start, f"the loss went from {start:.3g} to {end:.3g} in 30 steps")


def optimizer_state(subject: Subject) -> None:
    """Its state is saved and loaded."""
    first, second = (nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    one, other = (specs.build("optimizer", subject.spec, params=[p]) for p in (first, second))
    first.square().sum().backward()
    one.step()
    second.data.copy_(first.data)
    other.load_state_dict(one.state_dict())
    for parameter, optimizer in ((first, one), (second, other)):
        parameter.grad = 2 * parameter.detach()
        optimizer.step()
    expect(torch.allclose(first, second), "after load_state_dict the next step differs")


OPTIMIZER: tuple[Rule, ...] = (descends, optimizer_state)
