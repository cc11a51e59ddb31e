"""Contracts: what every part of a kind must do, as rules that are run on tiny inputs.

A rule is a function of a `Subject` that raises `Violation`; the first line of its docstring is its name. Each module
here holds the `RULES` of related kinds; `contracts.run` runs them for `sana-lab check` and in the tests of the parts
that ship, `contracts.preflight` those that are quick before a training of a user's own part.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sana_lab.config import specs


class Violation(Exception):
    """What a part does that its kind must not do, or lacks, in one line."""


class Subject(NamedTuple):
    """A part to check: its kind, its resolved spec, and what code supplies when it is built."""

    kind: str
    spec: dict[str, Any]
    supplied: dict[str, Any]

    def make(self, seed: int = 0) -> Any:
        """The part, with the weights of this seed, in evaluation mode."""
        torch.manual_seed(seed)
        part = specs.build(self.kind, self.spec, **self.supplied)
        return part.eval() if isinstance(part, nn.Module) else part


Rule = Callable[[Subject], None]

TOLERANCE = 1e-4
"""Largest relative difference of two computations of the same numbers in float32."""


def expect(condition: bool, text: str) -> None:
    """Raise `Violation` with the text unless the condition holds."""
    if not condition:
        raise Violation(text)


def expect_shape(value: Any, shape: tuple[int, ...], what: str) -> None:
    """A tensor of this shape, finite where it holds numbers."""
    expect(isinstance(value, Tensor), f"{what} is a {type(value).__name__}, expected a tensor of shape {shape}")
    expect(tuple(value.shape) == shape, f"{what} has shape {tuple(value.shape)}, expected {shape}")
    expect(value.is_meta or bool(value.isfinite().all()), f"{what} holds values that are not finite")


def expect_close(a: Tensor, b: Tensor, text: str) -> None:
    """Equal but for rounding."""
    difference = float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-12))
    expect(difference <= TOLERANCE, f"{text} (relative difference {difference:.2g})")


def expect_gradients(part: nn.Module, output: Tensor) -> None:
    """A finite gradient for every parameter that trains, from any output."""
    expect(output.requires_grad, "the output carries no gradient; is it detached, or computed under no_grad?")
    output.float().square().sum().backward()
    missing = [n for n, p in part.named_parameters() if p.requires_grad and p.grad is None]
    expect(not missing, f"no gradient reaches {_listed(missing)}; remove what is not used, or use it")
    bad = [n for n, p in part.named_parameters() if p.grad is not None and not bool(p.grad.isfinite().all())]
    expect(not bad, f"the gradient of {_listed(bad)} is not finite")


def expect_round_trip(subject: Subject, call: Callable[[Any], Tensor]) -> None:
    """Weights of one instance give another its results: everything that matters is in the state dict."""
    one, other = subject.make(0), subject.make(1)
    other.load_state_dict(one.state_dict())
    with torch.no_grad():
        expect_close(
            call(other), call(one), "after load_state_dict the output differs, so the state dict lacks something"
        )


def expect_meta(subject: Subject) -> None:
    """Built without memory, as every experiment is checked."""
    with torch.device("meta"):
        part = subject.make()
    tensors = {**dict(part.named_parameters()), **dict(part.named_buffers())}
    real = [n for n, p in tensors.items() if p.device.type != "meta"]
    expect(not real, f"{_listed(real)} lies in memory although built on the meta device; name no device when building")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def rule_name(rule: Callable[..., None]) -> str:
    """The first line of a rule's docstring, without its full stop."""
    return (rule.__doc__ or rule.__name__).splitlines()[0].rstrip(".")


def names(rules: tuple[Rule, ...]) -> Iterator[str]:
    """The names of rules, in order."""
    return map(rule_name, rules)
