"""Training steps with methods (`system.method`): their modules, the forward pass around them, and the sum of losses."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from sana_lab.checkpoints import build as checkpoints
from sana_lab.config import specs
from sana_lab.config.specs import Spec, SpecError
from sana_lab.diffusion import Process
from sana_lab.diffusion.sampling import generator
from sana_lab.methods import Method, Model, Step
from sana_lab.models.dit import BlockCall, Dit
from sana_lab.systems.losses import Noised, bound, noised, predict, repeated
from sana_lab.types import Batch, Part, Text

METHODS = 3  # stream of random numbers of methods, beside those of `losses`

RESERVED = ("loss", "objective")
"""Names under train/ that no term of a method may have."""


class Methods(nn.ModuleList):
    """The methods of a system. Empty until `build`, as only training needs their modules and teachers."""

    def __init__(self, method: Spec | list[Spec] | None) -> None:
        super().__init__()
        self.specs = [] if method is None else [*method] if isinstance(method, list | tuple) else [method]

    def build(self, model: Model, seed: int) -> None:
        """Build all methods for a model, with weights that depend on the seed alone. SpecError for one that does not
        fit it."""
        methods = [specs.build("method", spec) for spec in self.specs]
        for method, name in zip(methods, _names(map(specs.name_of, self.specs)), strict=True):
            method.name = name
        replacing = [method.name for method in methods if method.replaces_target]
        if len(replacing) > 1:
            raise SpecError(
                f"methods {' and '.join(map(repr, replacing))} each replace the target of the objective; expected one "
                "of them"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for method in methods:
                _check(method, model)
                method.build(model)
                for block in method.blocks:
                    model.block(block, 0, method.name)
        self.extend(methods)

    @property
    def built(self) -> list[Any]:
        """The methods, as `Method`s."""
        return [*self]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The groups of parameters that methods step with options of their own."""
        return [group for method in self.built for group in method.parameter_groups()]

    @contextmanager
    def around(self, dit: Dit, step: Step) -> Iterator[None]:
        """Context of a step's forward pass: changed by the methods, and with the hidden states that they read."""
        if not self.built:
            yield
            return
        for method in self.built:
            method.begin(step)
        dit.around = _Around(self.built, dit, step)
        try:
            yield
        finally:
            dit.around = None

    def terms(self, step: Step) -> dict[str, tuple[float, Tensor]]:
        """Weight and value of each named term. ValueError for a name that is not free."""
        terms: dict[str, tuple[float, Tensor]] = {}
        for method in self.built:
            for name, value in method.losses(step).items():
                if name in terms or name in RESERVED:
                    raise ValueError(f"method {method.name!r} has a term {name!r}, a name that is taken already")
                terms[name] = (method.weight, value)
            method.end()
        return terms


class _Around:
    """`Dit.around` of a step: each method's change of a block, and the hidden states that methods read."""

    def __init__(self, methods: list[Method], dit: Dit, step: Step) -> None:
        self.methods, self.step = methods, step
        self.indices = {block: i for i, block in enumerate(dit.blocks)} if dit.width is not None else {}
        self.read = {index for method in methods for index in method.blocks}

    def __call__(self, run: Callable[..., Tensor], block: nn.Module, *arguments: Tensor | None) -> Tensor:
        index, call = self.indices[block], cast(BlockCall, block)
        for method in self.methods:
            call = method.wrap(index, call, block)
        output = run(call, *arguments)
        if index in self.read:
            self.step.hidden[index] = self._whole(index, output)
        return output

    def _whole(self, index: int, tokens: Tensor) -> Tensor:
        for method in reversed(self.methods):
            tokens = method.whole(index, tokens)
        return tokens


def training_loss(
    system: Any,
    batch: Batch,
    latents: Tensor,
    text: Text,
    random: torch.Generator,
    part: Part,
    index: int,
    dropped: Sequence[bool],
) -> Tensor:
    """The loss of training batch `index`: the objective's, and the methods' terms. Both are logged, each by name.

    `dropped` says of which items `text` is the empty prompt's.
    `system` has `dit`, `flow`, `methods`, `settings`, `images_of` and `null_of`.
    """
    flow, draws, methods = system.flow, system.settings.draws, system.methods
    clean, noise, times, _ = noised(flow, repeated(latents, draws), random, part=part)
    step = Step(
        batch,
        text,
        clean,
        noise,
        times,
        flow.target(clean, noise),
        random=generator(system.settings.seed, METHODS, index),
        pixels=lambda: system.images_of(batch, latents),
        draws=draws,
        part=part,
        null=lambda: system.null_of(batch, text),
        dropped=dropped,
        patch=system.dit.patch,
    )
    with methods.around(system.dit, step):
        inputs = Noised(clean, noise, step.times, step.ends)
        step.prediction = predict(bound(system.dit, text, draws), flow, inputs)
    errors = (step.prediction - step.target).square().mean((1, 2, 3))
    weights = flow.weights(step.times)
    objective = errors if weights is None else errors * weights
    objective = (objective if step.weigh is None else objective * step.weigh(errors.detach())).mean()
    terms = methods.terms(step)
    loss = sum((weight * value for weight, value in terms.values()), objective)
    logged = {name: value for name, (_, value) in terms.items()} | ({"objective": objective} if len(methods) else {})
    for name, value in {"loss": loss, **logged}.items():
        system.log(f"train/{name}", value.detach(), batch_size=len(latents), sync_dist=True)
    return loss


def _names(names: Iterable[str]) -> list[str]:
    """Distinct names of specs: those of guests without their module, a second `repa` as `repa_2`."""
    plain = [name.rpartition(":")[2].lower() for name in names]
    return [name if (n := plain[: i + 1].count(name)) == 1 else f"{name}_{n}" for i, name in enumerate(plain)]


def _check(method: Method, model: Model) -> None:
    """SpecError for a method that does nothing, or that needs what the model does not have."""
    if type(method).losses is Method.losses and not method.changes_forward:
        raise SpecError(f"method {method.name!r} has neither `losses` nor `wrap`; expected one of them")
    if method.changes_forward:
        assert model.width
    if method.needs_images and not model.images:
        raise SpecError(
            f"method {method.name!r} needs images, and this system trains on latents without them; "
            "expected images: true of data latents, or system: text2image, which decodes them"
        )


def build_methods(
    system: Any,
    downsample: int,
    size: int,
    batch: int | None,
    images: bool,
    device: torch.device | None,
    buckets: Sequence[tuple[int, int]] = (),
) -> None:
    """Build the methods of a system, unless they are, for square images of `size` pixels and for those of `buckets`,
    (height, width) in pixels. SpecError if one does not fit."""
    if len(system.methods) or not system.methods.specs:
        return
    side = size // (downsample * system.dit.patch)
    place = torch.device("cpu") if device is None else device
    dit, trains = system.dit, getattr(system, "text_trains", False)

    def frozen(kind: str, spec: Spec, **supplied: int) -> Any:
        built = checkpoints.build(kind, spec, **supplied)
        return built.to(place).requires_grad_(False).eval() if on_device else built

    on_device = torch.get_default_device().type != "meta"
    model = Model(dit, size, (side, side), batch, images, place, trains, frozen, buckets)
    for method in map(specs.name_of, system.methods.specs):
        _check_velocities(method, system.flow)
    system.methods.build(model, system.settings.seed)


def _check_velocities(name: str, flow: Process) -> None:
    """SpecError for a method that needs the velocity of a flow, where the network predicts something else."""
    if getattr(specs.find("method", name), "velocities", False) and getattr(flow, "prediction", None) != "velocity":
        raise SpecError(
            f"method {name!r} needs a network that predicts the velocity of a flow; expected system.objective: flow "
            "and system.prediction: velocity"
        )
