"""Time of a step by phase: a timer that attributes all time to exactly one phase, and hooks that drive it."""

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
    "transfer": "copying the batch to the device",
    "text encoding": "tokenizing and the text encoder",
    "autoencoder encode": "images to latents",
    "autoencoder decode": "latents to images",
    "dit: caption": "caption projection, keys and values of all blocks",
    "dit: embeddings": "patches and time",
    "dit: attention": "self-attention with its projections",
    "dit: cross-attention": "cross-attention with its projections",
    "dit: feed-forward": "Mix-FFN",
    "dit: modulation and norms": "AdaLN vectors, norms, gates, residuals, positions: the rest of the DiT",
    "dit: head": "the last norm and projection",
    "dit: blocks": "all blocks, where they are compiled",
    "loss": "noise, times, interpolation, the loss: the training step outside the networks",
    "backward": "all gradients, and activations recomputed by checkpointing",
    "gradient clipping": "the norm and the scaling",
    "optimiser": "optimiser step, and zero_grad",
    "average": "averaged weights (EMA)",
    "logging": "self.log in the step",
    "callbacks": "divergence guard, learning rate, progress",
    OTHER: "Lightning's loop, and everything outside the other phases",
}
"""The phases of a training step, in order."""

SAMPLING = {name: text for name, text in TRAINING.items() if name.startswith(("text", "dit", "autoencoder d"))}
SAMPLING[OTHER] = "noise, solver, guidance, rounding to 8 bits"
"""The phases of sampling a batch."""


class PhaseTimer:
    """Seconds by phase of each step. Time is attributed to the innermost phase, so that phases add up to the step.

    On CUDA the device is synchronised at every phase boundary, so that phases do not overlap. With `boundaries` False
    only steps are timed.
    """

    def __init__(self, device: torch.device, boundaries: bool = True) -> None:
        self.device, self.boundaries = device, boundaries
        self.steps: list[dict[str, float]] = []  # finished steps, seconds by phase
        self._stack = [OTHER]
        self._current: dict[str, float] | None = None
        self._since = 0.0

    def step(self) -> None:
        """End the current step and begin the next."""
        self._record()
        if self._current is not None:
            self.steps.append(self._current)
        self._current = {}

    @contextmanager
    def phase(self, name: str | None) -> Iterator[None]:
        self.push(name)
        try:
            yield
        finally:
            self.pop()

    def push(self, name: str | None) -> None:
        """Begin a phase. None continues the current phase, as does every phase inside a backward."""
        if self.boundaries:
            self._record()
        same = name is None or not self.boundaries or "backward" in self._stack
        self._stack.append(self._stack[-1] if same or name is None else name)

    def pop(self) -> None:
        if self.boundaries:
            self._record()
        self._stack.pop()

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, run inside a phase."""

        def run(*arguments: Any, **options: Any) -> Any:
            with self.phase(name):
                return call(*arguments, **options)

        return run

    def _record(self) -> None:
        """Add the time since the last boundary to the current phase."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._current is not None:
            self._current[self._stack[-1]] = self._current.get(self._stack[-1], 0.0) + now - self._since
        self._since = now


@contextmanager
def instrument(system: nn.Module, timer: PhaseTimer) -> Iterator[None]:
    """Time the networks of a system by phase; hooks and wrapped methods are removed on exit."""
    with ExitStack() as stack:
        for owner, name, phase in _methods(system):
            stack.enter_context(_replaced(owner, name, timer.timed(phase, getattr(owner, name))))
        for module, phase in _modules(system):
            _hook(stack, module, timer, phase)
        step = SamplingDit.__call__
        stack.callback(setattr, SamplingDit, "__call__", step)
        SamplingDit.__call__ = timer.timed("dit: modulation and norms", step)  # type: ignore[method-assign]
        yield


def _methods(system: Any) -> Iterator[tuple[Any, str, str]]:
    """(owner, method, phase) of timed methods other than forward."""
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
    """(module, phase) of timed forwards."""
    dit = getattr(system, "dit", None)
    phases = {"text_encoder": "text encoding", "dit": "dit: modulation and norms"}
    yield from ((m, p) for name, p in phases.items() if isinstance(m := getattr(system, name, None), nn.Module))
    phases = {"patch_embed": "dit: embeddings", "time_embed": "dit: embeddings", "head": "dit: head"}
    phases |= {"caption_embed": "dit: caption"}
    yield from ((m, p) for name, p in phases.items() if isinstance(m := getattr(dit, name, None), nn.Module))
    phases = {"attention": "dit: attention", "cross": "dit: cross-attention", "ffn": "dit: feed-forward"}
    for block in () if dit is None or _compiled(dit) else getattr(dit, "blocks", ()):
        yield from ((m, p) for name, p in phases.items() if isinstance(m := getattr(block, name, None), nn.Module))


def _compiled(dit: Any) -> bool:
    return any(block._compiled_call_impl is not None for block in getattr(dit, "blocks", ()))


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of the instance, and restore it on exit."""
    own = vars(owner)
    before = own.get(name)
    own[name] = value
    try:
        yield
    finally:
        own.pop(name) if before is None else own.update({name: before})


def _hook(stack: ExitStack, module: nn.Module, timer: PhaseTimer, phase: str) -> None:
    stack.callback(module.register_forward_pre_hook(lambda *_: timer.push(phase), prepend=True).remove)
    stack.callback(module.register_forward_hook(lambda *_: timer.pop(), always_call=True).remove)


ACTIONS = {
    "train_dataloader_next": "data loading",
    "batch_to_device": "transfer",
    "training_step": "loss",
    "backward": "backward",
    "configure_gradient_clipping": "gradient clipping",
    "optimizer_step": "optimiser",
    "optimizer_zero_grad": "optimiser",
}
"""Lightning's profiler actions to phases."""


class PhaseProfiler(Profiler):
    """A Lightning profiler that drives a `PhaseTimer` by the Trainer's actions."""

    def __init__(self, timer: PhaseTimer) -> None:
        super().__init__()
        self.timer = timer

    def start(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next"):
            self.timer.step()
        self.timer.push(self._phase(action_name))

    def stop(self, action_name: str) -> None:
        self.timer.pop()

    def _phase(self, action: str) -> str | None:
        name = action.rpartition(".")[2]
        if action.startswith("[Callback]") or name in ("on_train_batch_start", "on_train_batch_end"):
            return "callbacks"
        return ACTIONS.get(name)
