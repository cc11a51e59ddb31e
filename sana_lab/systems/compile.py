"""`trainer.compile`: compile the blocks of a DiT in place, without changing parameters or state-dict keys."""

from typing import Any

from sana_lab.config.specs import SpecError
from sana_lab.systems import System

RECOMPILE_LIMIT = 128
"""Limit of compiled graphs, one per text length in training and validation; torch's default is 8."""


def check(system: System) -> None:
    """SpecError if blocks cannot be compiled: no blocks, or an incompatible option."""
    dit = system.part("dit")
    if not len(getattr(dit, "blocks", ())):
        raise SpecError(
            f"trainer.compile is for systems with a DiT of blocks, and {type(system).__name__} has none; expected false"
        )
    if getattr(dit, "checkpointing", False) == "selective":
        raise SpecError(
            "trainer.compile and system.dit.checkpointing 'selective' exclude each other: a compiled block chooses "
            "itself what it computes again; expected checkpointing true or false"
        )


def check_compiler(device: str) -> None:
    """SpecError if this machine has no compiler for a device."""
    if missing := missing_compiler(device):
        raise SpecError(f"trainer.compile needs {missing} on {device}; install it, or leave trainer.compile false")


def missing_compiler(device: str) -> str | None:
    """Missing requirement of torch.compile on a device; None if it can run."""
    if device == "cpu":
        return None if _cpp_compiler() else "a C++ compiler such as g++"
    from torch.utils._triton import has_triton

    return None if has_triton() else "Triton"


def compile_blocks(dit: Any, backend: str = "inductor") -> None:
    """Compile each block of a DiT as one graph, shared by all blocks because parameters are inputs.

    Each text length is recompiled (`bucket` of cached features and `pad_to_max` limit the number of lengths), because
    with symbolic lengths the backward of torch 2.14's inductor uses the mask strides of the first length.
    """
    from torch._dynamo import config as dynamo

    dynamo.recompile_limit = max(dynamo.recompile_limit, RECOMPILE_LIMIT)
    for block in dit.blocks:
        block.compile(fullgraph=True, dynamic=False, backend=backend)


def _cpp_compiler() -> str | None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return get_cpp_compiler()
    except InvalidCxxCompiler:
        return None
