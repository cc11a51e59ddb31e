"""A DiT whose parameters are sharded over ranks (`trainer.strategy: fsdp2`, torch's `fully_shard`).

Each rank has a slice of every parameter, of its gradient, of the optimiser's state and of its average. Attention,
cross-attention and feed-forward layer of a block are gathered one by one while they run, in forward and backward;
what the blocks share is gathered for the whole of a pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(dit: Any, mesh: Any) -> None:
    """Shard a DiT over a mesh of one dimension."""
    for module in dit.shards():
        if any(True for _ in module.parameters()):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
            if hasattr(module, "keys_values"):
                register_fsdp_forward_method(module, "keys_values")
    fully_shard(dit, mesh=mesh, reshard_after_forward=True)


def is_sharded(module: nn.Module) -> bool:
    """Whether a part of the module is sharded, so that reading its parameters is work of all ranks."""
    return any(isinstance(m, FSDPModule) for m in module.modules())


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Context in which every rank has all parameters, for passes that ranks make on their own, such as sampling; to be
    entered by all ranks. Parameters cannot be written in it."""
    shards = [m for m in module.modules() if isinstance(m, FSDPModule)]
    for each in shards:
        each.unshard()
        each.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for each in shards:
            each.set_reshard_after_forward(True, recurse=False)
            each.reshard()


def local(tensor: Tensor) -> Tensor:
    """This rank's slice, which shares memory with the tensor; a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole tensor on every rank; to be called by all of them."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(whole_tensor: Tensor, reference: Tensor) -> Tensor:
    """A whole tensor sliced as `reference` is, without communication: each rank has it."""
    if not isinstance(reference, DTensor):
        return whole_tensor
    mesh = reference.device_mesh
    return distribute_tensor(whole_tensor.to(mesh.device_type), mesh, reference.placements, src_data_rank=None)
