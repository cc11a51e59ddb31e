"""Where the time of a step goes: a clock that gives every moment to one phase, and what sets it in a system."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch.profilers import Profiler
from torch import nn

from sana_lab.models.dit import SamplingDit

OTHER = "other"
TRAINING = {
    "data loading": "the next batch, from the data module",
    "transfer": "of the batch to the device",
    "text encoding": "tokens and the text encoder",
    "autoencoder encode": "pictures to latents",
    "autoencoder decode": "latents to pictures",
    "dit: caption": "caption projection, keys and values of all blocks",
    "dit: embeddings": "patches and time",
    "dit: attention": "self-attention with its projections",
    "dit: cross-attention": "with its projections",
    "dit: feed-forward": "Mix-FFN",
    "dit: modulation and norms": "AdaLN vectors, norms, gates, residuals, positions: the rest of the DiT",
    "dit: head": "the last norm and projection",
    "dit: blocks": "whole, where they are compiled",
    "loss": "noise, times, mixing, the loss, and what of the training step is no network",
    "backward": "of all; with checkpointing what it computes again",
    "gradient clipping": "the norm and the scaling",
    "optimiser": "its step, and gradients set to none",
    "average": "of weights (EMA)",
    "logging": "self.log in the step",
    "callbacks": "divergence guard, learning rate, progress",
    OTHER: "Lightning's loop and what no phase claims",
}
"""The phases of a training step, in order."""

SAMPLING = {name: what for name, what in TRAINING.items() if name.startswith(("text", "dit", "autoencoder d"))}
SAMPLING[OTHER] = "noise, solver, guidance, rounding to 8 bits"
"""The phases of drawing a batch."""

Wrapped = Callable[..., Any]


class Clock:
    """Seconds by phase, step by step. Of nested phases the innermost counts, so that phases add up to their step.

    On CUDA the device is waited for at each border: what is measured is each phase's own time, not how well they
    overlap. `borders` false leaves out all but the borders of steps.
    """

    def __init__(self, device: torch.device, borders: bool = True) -> None:
        self.device, self.borders = device, borders
        self.done: list[dict[str, float]] = []
        self._stack = [OTHER]
        self._now: dict[str, float] | None = None
        self._since = 0.0

    def step(self) -> None:
        """A step ends, and the next begins."""
        self._charge()
        if self._now is not None:
            self.done.append(self._now)
        self._now = {}

    @contextmanager
    def phase(self, name: str | None) -> Iterator[None]:
        self.push(name)
        try:
            yield
        finally:
            self.pop()

    def push(self, name: str | None) -> None:
        """A phase begins; None, and whatever a backward runs, goes on with the one that is."""
        if self.borders:
            self._charge()
        kept = name is None or not self.borders or "backward" in self._stack
        self._stack.append(self._stack[-1] if kept or name is None else name)

    def pop(self) -> None:
        if self.borders:
            self._charge()
        self._stack.pop()

    def timed(self, name: str, call: Wrapped) -> Wrapped:
        def run(*arguments: Any, **options: Any) -> Any:
            with self.phase(name):
                return call(*arguments, **options)

        return run

    def _charge(self) -> None:
        """The time since the last border, to the phase that is."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._now is not None:
            self._now[self._stack[-1]] = self._now.get(self._stack[-1], 0.0) + now - self._since
        self._since = now


@contextmanager
def watched(system: nn.Module, clock: Clock) -> Iterator[None]:
    """A system whose networks set the clock meanwhile."""
    with ExitStack() as stack:
        for owner, name, phase in _methods(system):
            stack.enter_context(_replaced(owner, name, clock.timed(phase, getattr(owner, name))))
        for module, phase in _modules(system):
            _hook(stack, module, clock, phase)
        step = SamplingDit.__call__
        stack.callback(setattr, SamplingDit, "__call__", step)
        SamplingDit.__call__ = clock.timed("dit: modulation and norms", step)  # type: ignore[method-assign]
        yield


def _methods(system: Any) -> Iterator[tuple[Any, str, str]]:
    """(owner, method, phase) of what is no module's forward."""
    yield system, "log", "logging"
    if hasattr(system, "average"):
        yield system.average, "update", "average"
    if hasattr(system, "encode_text"):
        yield system, "encode_text", "text encoding"
        yield system.text_encoder, "negative", "text encoding"
    if hasattr(system, "autoencoder"):
        yield from ((system.autoencoder, name, "autoencoder encode") for name in ("encode", "posterior"))
        yield from ((system.autoencoder, name, "autoencoder decode") for name in ("decode", "reconstruct"))
    dit = getattr(system, "dit", None)
    if dit is not None:
        yield dit, "prepare", "dit: caption"
        crosses = [block.cross for block in getattr(dit, "blocks", ()) if hasattr(block, "cross")]
        yield from ((cross, "keys_values", "dit: caption") for cross in crosses)
    if dit is not None and _compiled(dit):
        yield dit, "run", "dit: blocks"


def _modules(system: Any) -> Iterator[tuple[nn.Module, str]]:
    dit = getattr(system, "dit", None)
    named = {"text_encoder": "text encoding", "dit": "dit: modulation and norms"}
    yield from ((m, p) for name, p in named.items() if isinstance(m := getattr(system, name, None), nn.Module))
    named = {"patch_embed": "dit: embeddings", "time_embed": "dit: embeddings", "head": "dit: head"}
    named |= {"caption_embed": "dit: caption"}
    yield from ((m, p) for name, p in named.items() if isinstance(m := getattr(dit, name, None), nn.Module))
    named = {"attention": "dit: attention", "cross": "dit: cross-attention", "ffn": "dit: feed-forward"}
    for block in () if dit is None or _compiled(dit) else getattr(dit, "blocks", ()):
        yield from ((m, p) for name, p in named.items() if isinstance(m := getattr(block, name, None), nn.Module))


def _compiled(dit: Any) -> bool:
    return any(block._compiled_call_impl is not None for block in getattr(dit, "blocks", ()))


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of this object, over that of its class."""
    own = vars(owner)
    before = own.get(name)
    own[name] = value
    try:
        yield
    finally:
        own.pop(name) if before is None else own.update({name: before})


def _hook(stack: ExitStack, module: nn.Module, clock: Clock, phase: str) -> None:
    stack.callback(module.register_forward_pre_hook(lambda *_: clock.push(phase), prepend=True).remove)
    stack.callback(module.register_forward_hook(lambda *_: clock.pop(), always_call=True).remove)


ACTIONS = {
    "train_dataloader_next": "data loading",
    "batch_to_device": "transfer",
    "training_step": "loss",
    "backward": "backward",
    "configure_gradient_clipping": "gradient clipping",
    "optimizer_step": "optimiser",
    "optimizer_zero_grad": "optimiser",
}
"""What Lightning calls them."""


class Hooks(Profiler):
    """Lightning's profiler, which it tells what it does, as a clock's hand."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def start(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next"):
            self.clock.step()
        self.clock.push(self._phase(action_name))

    def stop(self, action_name: str) -> None:
        self.clock.pop()

    def _phase(self, action: str) -> str | None:
        name = action.rpartition(".")[2]
        if action.startswith("[Callback]") or name in ("on_train_batch_start", "on_train_batch_end"):
            return "callbacks"
        return ACTIONS.get(name)
