"""Contract of training methods: on one step of a tiny model."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sana_lab.config import specs
from sana_lab.config.specs import SpecError
from sana_lab.contracts import Rule, Subject, expect
from sana_lab.methods import Grid, Model, Step
from sana_lab.types import Batch, Text

DIT: dict[str, Any] = {"name": "sana", "dim": 32, "depth": 4, "cross_heads": 2, "mean_velocity": True}
SIZE, SIDE, ROWS, CHANNELS, TEXT = 64, 4, 4, 4, 12
"""Pixels and tokens a side, items of a batch, channels of latents, width of text."""

SQUARE, WIDE = (SIDE, SIDE), (2, 8)
"""Tokens (h, w) of a batch of squares, and of one in an aspect-ratio bucket."""


class Trained(NamedTuple):
    """A step after its forward pass."""

    dit: Any
    methods: Any  # sana_lab.systems.method_steps.Methods
    terms: dict[str, tuple[float, Tensor]]
    step: Step


def fits(subject: Subject) -> None:
    """It can be built for a model without memory, and says which blocks it reads."""
    with torch.device("meta"):
        _methods(subject).build(_model(_dit()), 0)


def terms(subject: Subject) -> None:
    """Its terms are finite numbers, or it changes the forward pass; gradients reach the model and what it owns."""
    trained = _train(subject)
    expect(bool(trained.terms) or trained.methods.built[0].changes_forward, "it gives no term in a step")
    for name, (_, value) in trained.terms.items():
        expect(isinstance(value, Tensor) and value.shape == (), f"term {name!r} is no number: {_kind(value)}")
        expect(bool(value.isfinite()), f"term {name!r} is {float(value.detach())}")
    loss = trained.step.prediction.square().mean() + sum(weight * value for weight, value in trained.terms.values())
    loss.backward()
    parameters = [*trained.dit.named_parameters(), *trained.methods.named_parameters()]
    bad = [name for name, p in parameters if p.grad is not None and not bool(p.grad.isfinite().all())]
    expect(not bad, f"the gradient of {', '.join(bad[:5])} is not finite")
    missing = [name for name, p in trained.methods.named_parameters() if p.requires_grad and p.grad is None]
    expect(not missing, f"no gradient reaches {', '.join(missing[:5])} of it; remove what is not used")


def repeatable(subject: Subject) -> None:
    """Equal steps have equal terms, so that a resumed training is the uninterrupted one."""
    one, other = _train(subject, 0), _train(subject, 1)
    unchanged = torch.equal(one.step.prediction, other.step.prediction)
    expect(unchanged, "the same step has another prediction; use Step.uniform for random numbers")
    same = all(torch.equal(value, other.terms[name][1]) for name, (_, value) in one.terms.items())
    expect(same, "the same step has other terms; use Step.uniform for random numbers")


def leaves(subject: Subject) -> None:
    """After a step the model is as it was, without the method."""
    trained, plain = _train(subject), _dit()
    expect(trained.dit.around is None, "the forward pass stays changed after a step")
    changed = [name for name, p in plain.state_dict().items() if not torch.equal(p, trained.dit.state_dict()[name])]
    expect(not changed, f"it changed {', '.join(changed[:5])} of the model in a step, without the optimiser")
    with torch.no_grad():
        same = torch.equal(_run(plain, trained.step), _run(trained.dit, trained.step))
    expect(same, "after a step the model gives another result")


def bucket(subject: Subject) -> None:
    """It trains on a batch that is not square, or refuses it while it is built (`Model.buckets`, SpecError)."""
    try:
        with torch.device("meta"):
            _methods(subject).build(_model(_dit(), (WIDE,)), 0)
    except SpecError:
        return
    for name, (_, value) in _train(subject, grid=WIDE).terms.items():
        expect(bool(value.isfinite()), f"term {name!r} is {float(value.detach())} on {WIDE} tokens")


def _methods(subject: Subject) -> Any:
    from sana_lab.systems.method_steps import Methods  # here, as a training imports all contracts

    return Methods(subject.spec)


def _dit() -> Any:
    torch.manual_seed(0)
    return specs.build("dit", DIT, channels=CHANNELS, text_dim=TEXT)


def _model(dit: Any, grids: Sequence[Grid] = ()) -> Model:
    return Model(dit, SIZE, SQUARE, ROWS, buckets=[*map(_pixels, grids)])


def _pixels(grid: Grid) -> tuple[int, int]:
    """Height and width of images of so many tokens."""
    h, w = grid
    return h * SIZE // SIDE, w * SIZE // SIDE


def _train(subject: Subject, seed: int = 0, grid: Grid = SQUARE) -> Trained:
    """One step of the model with the method, up to its terms, under a seed of torch's own random numbers."""
    dit, methods = _dit(), _methods(subject)
    methods.build(_model(dit, (grid,)), 0)
    step = _step(grid)
    torch.manual_seed(seed)
    with methods.around(dit, step):
        step.prediction = _run(dit, step)
    return Trained(dit, methods, methods.terms(step), step)


def _run(dit: Any, step: Step) -> Tensor:
    return dit(step.latents, step.times, step.text)


def _step(grid: Grid) -> Step:
    random = torch.Generator().manual_seed(0)
    shape = (ROWS, CHANNELS, *grid)
    latents, noise = (torch.randn(shape, generator=random) for _ in range(2))
    images = torch.rand(ROWS, 3, *_pixels(grid), generator=random) * 2 - 1
    text = Text(torch.randn(ROWS, 3, TEXT, generator=random), torch.ones(ROWS, 3, dtype=torch.bool))
    times = torch.rand(ROWS, generator=random)
    batch = Batch(images, ["a red circle"] * ROWS, latents)
    null = Text(text.tokens[:1, :1] * 0, text.mask[:1, :1])
    target = noise - latents
    return Step(batch, text, latents, noise, times, target, random, lambda: images, null=lambda: null)


def _kind(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


METHOD: tuple[Rule, ...] = (fits, terms, bucket, repeatable, leaves)
