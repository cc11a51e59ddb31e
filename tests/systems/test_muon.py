"""Muon: its orthogonalisation, its AdamW, which parameters it takes, and training through the verb."""

import copy

import pytest
import torch
from torch import Tensor, nn

from sana_lab.config import specs
from sana_lab.config.specs import SpecError
from sana_lab.systems.muon import Muon, is_hidden, orthogonal


class Net(nn.Module):
    """An embedding, two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)


def step(net: Net, optimizer: torch.optim.Optimizer, n: int) -> None:
    for i in range(n):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(i))
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("shape", [(12, 12), (30, 7), (7, 30)])
def test_singular_values_move_near_one_and_vectors_stay(shape: tuple[int, int]) -> None:
    matrix = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    result = orthogonal(matrix, 5)
    values = torch.linalg.svdvals(result)
    if shape[0] != shape[1]:  # a square matrix has singular values near zero, which take more iterations
        assert 0.6 < values.min() < values.max() < 1.25
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.mT @ result @ v.mT  # diagonal in the matrix's own singular vectors
    off = inside - torch.diag_embed(torch.diagonal(inside, dim1=1, dim2=2))
    assert off.abs().max() < 1e-9


def test_a_hidden_matrix_moves_by_the_stated_distance() -> None:
    net, rate = Net(), 0.01
    before = net.blocks[0].weight.detach().clone()
    optimizer = Muon(net.named_parameters(), muon_lr=rate, weight_decay=0.0)
    net(torch.ones(4, 6)).square().mean().backward()
    gradient = net.blocks[0].weight.grad.clone()
    optimizer.step()
    expected = -rate * 0.2 * 8**0.5 * orthogonal((1.95 * gradient)[None])[0]
    torch.testing.assert_close(net.blocks[0].weight.detach() - before, expected)


def test_other_parameters_step_as_torch_adamw_does() -> None:
    net = Net()
    peer = copy.deepcopy(net)
    ours = Muon(net.named_parameters(), lr=3e-3, muon_lr=1e-30, betas=(0.9, 0.98), weight_decay=0.1)
    for block in peer.blocks:
        block.weight.requires_grad_(False)
    rest = [p for p in peer.parameters() if p.requires_grad]
    theirs = torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.1)
    step(net, ours, 5)
    step(peer, theirs, 5)
    for (name, a), b in zip(net.named_parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_state_is_restored() -> None:
    net = Net()
    optimizer = Muon(net.named_parameters())
    step(net, optimizer, 3)
    again = copy.deepcopy(net)
    restored = Muon(again.named_parameters())
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(net, optimizer, 2)
    step(again, restored, 2)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


def test_matrices_of_blocks_are_hidden_and_others_are_not() -> None:
    matrix, kernel = nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(4, 1, 3, 3))
    assert is_hidden("dit.blocks.0.attention.qkv.weight", matrix)
    assert is_hidden("text_encoder.network.layers.1.mlp.up_proj.weight", matrix)
    assert not is_hidden("dit.blocks.0.table", matrix)
    assert not is_hidden("dit.blocks.0.ffn.depthwise.weight", kernel)
    assert not is_hidden("dit.head.linear.weight", matrix)
    assert not is_hidden("dit.blocks.0.attention.qkv.bias", nn.Parameter(torch.zeros(4)))


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"none of 2 parameters is a hidden matrix"):
        Muon(nn.Linear(2, 2).named_parameters())


def test_a_rate_below_zero_is_refused() -> None:
    with pytest.raises(SpecError, match="muon_lr"):
        specs.resolve("optimizer", {"name": "muon", "muon_lr": -1.0})


def test_half_precision_is_of_the_products_alone() -> None:
    torch.manual_seed(0)
    nets, rate = [Net(), Net()], 0.01
    nets[1].load_state_dict(nets[0].state_dict())
    before = nets[0].blocks[0].weight.detach().clone()
    for net, half in zip(nets, (False, True), strict=True):
        step(net, Muon(net.named_parameters(), muon_lr=rate, weight_decay=0.0, half=half), 1)
    full, half = (net.blocks[0].weight.detach() - before for net in nets)
    assert half.dtype == torch.float32
    assert not torch.equal(full, half)
    assert torch.cosine_similarity(full.flatten(), half.flatten(), dim=0) > 0.95


@pytest.mark.parametrize("shape", [(30, 7), (7, 30), (128, 512)])
def test_singular_values_move_near_one_in_bfloat16(shape: tuple[int, int]) -> None:
    matrix = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    half, full = orthogonal(matrix.bfloat16(), 5), orthogonal(matrix, 5)
    assert half.dtype == torch.bfloat16
    values = torch.linalg.svdvals(half.float())
    assert 0.6 < values.min() < values.max() < 1.25
    assert torch.cosine_similarity(full.flatten(1), half.float().flatten(1), dim=1).min() > 0.99


def test_a_checkpoint_from_before_half_goes_on_in_full_precision() -> None:
    torch.manual_seed(0)
    nets = [Net(), Net()]
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers = [Muon(net.named_parameters(), half=half) for net, half in zip(nets, (False, True), strict=True)]
    state = optimizers[0].state_dict()
    for group in state["param_groups"]:
        del group["half"]
    optimizers[1].load_state_dict(state)
    for net, optimizer in zip(nets, optimizers, strict=True):
        step(net, optimizer, 1)
    assert all(torch.equal(a, b) for a, b in zip(*(net.parameters() for net in nets), strict=True))
