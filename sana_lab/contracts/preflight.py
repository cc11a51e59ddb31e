"""The user's own parts of an experiment, checked in a second or two before its training.

Kinds with a quick contract are checked by all of it. Networks, data and systems are checked at the sizes of the
experiment: with numbers where that is little work, else by their shapes on the meta device.
"""

import ast
import functools
import inspect
import json
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sana_lab.checkpoints.build import build_on_meta, without_weights
from sana_lab.checkpoints.meta import on_meta
from sana_lab.config import experiments, schema, specs
from sana_lab.config.specs import SpecError
from sana_lab.contracts import Subject, Violation, expect, expect_shape, networks, rule_name, training
from sana_lab.contracts.run import check, describe, guests
from sana_lab.data import DataModule
from sana_lab.systems import System
from sana_lab.types import Batch, Text

QUICK = ("attention", "ffn", "solver", "measure", "extractor", "optimizer", "method")
"""Kinds whose whole contract takes a second or less."""

MAX_WORK = 3e9
"""Most products of parameters and positions that are computed; more is checked on the meta device."""

OTHER_MACHINES = ("meta", "cuda", "gpu", "triton", "not attached to")
"""Words of errors that do not say what a training would do: of the meta device, of devices that are not here, and of a
system without a trainer."""

REPORT = "expected plain data in a dict, such as `evaluator.generated(self.sample)`"


class Sizes(NamedTuple):
    """Sizes of an experiment."""

    size: int  # pixels a side of the images
    channels: int  # of the latents
    downsample: int  # pixels a side of a latent
    text_dim: int  # width of the text's features
    tokens: int  # of a text

    def side(self, unit: int) -> int:
        """Pixels a side of the images, as a multiple of a unit."""
        return max(1, self.size // unit) * unit


def check_guests(experiment: schema.Config, system: System) -> None:
    """SpecError if a part of the user's own in an experiment breaks a rule of its kind; `system` is on the meta
    device."""
    sizes = sizes_of(experiment, system)
    for kind, spec in guests(experiment):
        text = json.dumps(spec, sort_keys=True)
        if kind in QUICK:
            _check_contract(kind, text)
        elif kind in NETWORKS:
            _check_network(kind, text, sizes)
        elif kind == "data":
            _check_data(text)
        elif kind == "system":
            _check_system(text, json.dumps(experiment["data"], sort_keys=True))


def sizes_of(experiment: schema.Config, system: System) -> Sizes:
    """What the parts of a system say of their sizes; where they say nothing, those of the contracts."""
    size = experiments.source_of(experiment["data"]).get("size")
    autoencoder, text, dit = (system.part(kind) for kind in ("autoencoder", "text_encoder", "dit"))
    return Sizes(
        size if isinstance(size, int) else 32,
        _number(4, (autoencoder, "channels"), (dit, "channels")),
        _number(1, (autoencoder, "downsample"), (system, "downsample")),
        _number(12, (text, "dim"), (dit, "text_dim")),
        min(300, _number(5, (text, "max_tokens"))),
    )


def _number(default: int, *places: tuple[object, str]) -> int:
    values = (getattr(part, name, None) for part, name in places)
    return next((value for value in values if isinstance(value, int) and value > 0), default)


@functools.cache
def _check_contract(kind: str, spec: str) -> None:
    given = json.loads(spec)
    for finding in check(kind, given):
        if finding.problem is not None:
            raise _refusal(kind, given, finding.rule, finding.problem)


def _refusal(kind: str, spec: schema.Config, rule: str, problem: str) -> SpecError:
    name = spec["name"]
    return SpecError(
        f"{kind} {name!r} breaks a rule of its kind: {rule}: {problem}; `sana-lab check {name}` runs all of them"
    )


def _run(subject: Subject, rule: str, call: Callable[[], None]) -> None:
    """SpecError if the call finds a violation; an error of this machine or of the meta device says nothing."""
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            call()
    except Violation as error:
        raise _refusal(subject.kind, subject.spec, rule, str(error)) from error
    except Exception as error:  # whatever the part does
        if not any(word in str(error).lower() for word in OTHER_MACHINES):
            raise _refusal(subject.kind, subject.spec, rule, describe(error, subject)) from error


@contextmanager
def _computing(part: nn.Module, positions: int) -> Iterator[None]:
    """Context with numbers if a part on the meta device is little work at so many positions, else with shapes alone."""
    if sum(p.numel() for p in part.parameters()) * positions <= MAX_WORK:
        yield
    else:
        with on_meta():
            yield


# networks


def velocity(dit: Any, sizes: Sizes) -> None:
    """The velocity has the latents' shape."""
    side = sizes.side(sizes.downsample * dit.patch) // sizes.downsample
    x, mask = torch.randn(2, sizes.channels, side, side), torch.ones(2, sizes.tokens, dtype=torch.bool)
    text = Text(torch.randn(2, sizes.tokens, sizes.text_dim), mask)
    guidance = torch.full((2,), 4.5) if getattr(dit, "guidance", None) is not None else None
    expect_shape(dit(x, torch.full((2,), 0.5), text, guidance), tuple(x.shape), "the velocity")


def latents(autoencoder: Any, sizes: Sizes) -> None:
    """Images give latents, and these images of the same size."""
    side, unit = sizes.side(autoencoder.downsample), autoencoder.downsample
    images = torch.rand(2, 3, side, side) * 2 - 1
    posterior = autoencoder.posterior(images)
    expect(isinstance(posterior, tuple) and len(posterior) == 2, "`posterior` returns no pair (mean, log-variance)")
    for name, value in zip(("mean", "log-variance"), posterior, strict=True):
        expect_shape(value, (2, autoencoder.channels, side // unit, side // unit), f"the {name}")
    expect_shape(autoencoder.decode(autoencoder.encode(images)), tuple(images.shape), "the reconstruction")


def features(encoder: Any, sizes: Sizes) -> None:
    """Prompts give tokens (B, L, dim) and a mask (B, L)."""
    tokens, mask = networks.encode(encoder, networks.WORDS)
    rows, length = len(networks.WORDS), tokens.shape[1] if tokens.ndim > 1 else 0
    expect_shape(tokens, (rows, length, encoder.dim), "the tokens")
    expect(tuple(mask.shape) == (rows, length), f"the mask has shape {tuple(mask.shape)}, expected {(rows, length)}")
    expect(mask.dtype == torch.bool, f"the mask is {mask.dtype}, expected torch.bool")


def _attended(sizes: Sizes, patch: int) -> int:
    """Positions of two grids of tokens, more for large ones, in which a token may attend to all others."""
    tokens = (sizes.size // sizes.downsample // patch) ** 2
    return 2 * tokens * max(1, tokens // 256)


class Network(NamedTuple):
    """How networks of a kind are checked."""

    rule: Callable[[Any, Sizes], None]
    attributes: tuple[str, ...]  # whole numbers that it has
    positions: Callable[[Any, Sizes], int]  # at which the check computes


NETWORKS = {
    "dit": Network(velocity, ("channels", "text_dim", "patch"), lambda d, s: _attended(s, d.patch)),
    "autoencoder": Network(latents, ("channels", "downsample"), lambda _, s: 2 * s.size**2),
    "text_encoder": Network(features, ("dim", "max_tokens"), lambda _, s: 100),
}


@functools.cache
def _check_network(kind: str, spec: str, sizes: Sizes) -> None:
    network, supplied = NETWORKS[kind], {"channels": sizes.channels, "text_dim": sizes.text_dim}
    subject = Subject(kind, without_weights(json.loads(spec)), supplied if kind == "dit" else {})

    def call() -> None:
        part = build_on_meta(kind, subject.spec, **subject.supplied)
        for name in network.attributes:
            expect(isinstance(getattr(part, name, None), int), f"it sets no attribute `{name}`, expected a number")
        with torch.no_grad(), _computing(part, network.positions(part, sizes)):
            network.rule(subject.make(), sizes)

    _run(subject, rule_name(network.rule), call)


# data


def prepares(data: Any) -> bool:
    """Whether a data module has nothing to give before Lightning's hooks."""
    return any(getattr(data, hook) is not getattr(DataModule, hook) for hook in ("setup", "prepare_data"))


@functools.cache
def _check_data(spec: str) -> None:
    subject = Subject("data", json.loads(spec), {})
    if not prepares(specs.find("data", subject.spec["name"])):
        for rule in (training.sizes, training.items):
            _run(subject, rule_name(rule), functools.partial(rule, subject))


# systems


@functools.cache
def _check_system(spec: str, data: str) -> None:
    subject = Subject("system", without_weights(json.loads(spec)), {})
    target: Any = specs.find("system", subject.spec["name"])
    _run(subject, rule_name(evaluation), functools.partial(evaluation, target))
    if (batch := first_batch(json.loads(data))) is not None:
        _run(subject, rule_name(step), functools.partial(step, subject, batch))


def first_batch(spec: schema.Config) -> Batch | None:
    """The first two items of a data set; None of caches, and of data that cannot be read yet."""
    if "source" in spec or prepares(specs.find("data", spec["name"])):
        return None
    try:
        data: DataModule = specs.build("data", spec)
        batch = data.batch_at(range(min(2, data.batch, data.len_train or 2)))
    except Exception:  # of a file that comes later; the data's own checks say what is wrong
        return None
    return batch if pixels(batch).ndim == 4 else None


def pixels(batch: Batch) -> Tensor:
    """The images or latents of a batch."""
    values = batch.images if batch.latents is None else batch.latents
    assert values is not None
    return values


def step(subject: Subject, batch: Batch) -> None:
    """A training step returns a loss."""
    meta: Any = build_on_meta("system", subject.spec)
    if (methods := meta.part("methods")) is not None and methods.specs:  # built when training begins
        return
    rows, _, height, width = pixels(batch).shape
    with _computing(meta, rows * height * width):
        system = subject.make().train()
        output = system.training_step(_moved(batch), 0)
    loss: Any = output.get("loss") if isinstance(output, dict) else output
    if system.automatic_optimization:
        expect(isinstance(loss, Tensor), f"`training_step` returns a {type(loss).__name__}, expected the loss")
        expect_shape(loss.reshape(-1) if loss.numel() == 1 else loss, (1,), "the loss")
        expect(loss.requires_grad, "the loss carries no gradient; is it detached, or computed under no_grad?")


def _moved(value: Any) -> Any:
    """Tensors of a batch on the device of new tensors."""
    if isinstance(value, Tensor):
        return value.to(torch.get_default_device())
    return type(value)(*map(_moved, value)) if hasattr(value, "_fields") else value


def evaluation(system: type[System]) -> None:
    """Its `evaluate` takes an evaluator and returns a report."""
    try:
        inspect.signature(system.evaluate).bind(None, None)
    except TypeError as error:
        raise Violation(f"`evaluate`: {error}; expected evaluate(self, evaluator)") from error
    try:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(system.evaluate))).body
    except (OSError, SyntaxError, TypeError, ValueError):  # code without a source
        return
    inside = list(_statements(function))
    returns = [n.value for n in inside if isinstance(n, ast.Return)]
    values = [v for v in returns if v is not None and not (isinstance(v, ast.Constant) and v.value is None)]
    raises = any(isinstance(node, ast.Raise) for node in inside)
    expect(bool(values) or raises, f"`evaluate` returns nothing, {REPORT}")
    wrong = [ast.unparse(v) for v in values if isinstance(v, ast.List | ast.Tuple | ast.Set | ast.Constant)]
    expect(not wrong, f"`evaluate` returns {', '.join(wrong)}, {REPORT}")


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function, without those of functions inside it."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            yield child
            yield from _statements(child)
