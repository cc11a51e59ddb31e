"""CAME and 8-bit state: steps by the published formulas in plain loops, and resuming in the types that were saved."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sana_lab.config import specs
from sana_lab.systems import came as came_module
from sana_lab.systems import eight_bit
from sana_lab.systems.adamw_8bit import AdamW8bit
from sana_lab.systems.came import Came, is_matrix

RATE, BETAS, EPS, CLIP, DECAY = 0.01, (0.9, 0.99, 0.995), (1e-30, 1e-16), 1.0, 0.1


class Net(nn.Module):
    """A matrix, a norm, a bias, a 1x1 and a depthwise convolution."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm = nn.Linear(4, width), nn.LayerNorm(width)
        self.point, self.depth = nn.Conv2d(width, 5, 1), nn.Conv2d(5, 5, 3, groups=5, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.linear(x)))
        return self.depth(self.point(x.permute(0, 3, 1, 2)))


def gradients(net: nn.Module, steps: int, dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    """Gradients of so many steps for the parameters, of very different sizes."""
    random = torch.Generator().manual_seed(1)
    return [
        [torch.randn(p.shape, generator=random).mul(10.0 ** (i - 2)).to(dtype) for i, p in enumerate(net.parameters())]
        for _ in range(steps)
    ]


def run(net: nn.Module, optimizer: torch.optim.Optimizer, steps: list[list[Tensor]]) -> list[Tensor]:
    for step in steps:
        for p, g in zip(net.parameters(), step, strict=True):
            p.grad = g.to(p.dtype, copy=True)
        optimizer.step()
    return [p.detach() for p in net.parameters()]


def by_hand(p: Tensor, steps: list[Tensor]) -> Tensor:
    """Algorithm 2 of arXiv 2307.02047 in float64, element by element."""
    b1, b2, b3 = BETAS
    shape, matrix = p.shape, is_matrix(p)
    theta = p.detach().double().reshape(len(p), -1) if matrix else p.detach().double().reshape(1, -1)
    n, m = theta.shape
    mean, square = torch.zeros(n, m), torch.zeros(n, m)
    row, column, unstable_row, unstable_column = (torch.zeros(k).double() for k in (n, m, n, m))
    mean, square = mean.double(), square.double()
    for step in steps:
        g = step.double().reshape(n, m)
        update = torch.zeros(n, m).double()
        for i in range(n):
            row[i] = b2 * row[i] + (1 - b2) * sum((g[i, j] ** 2 + EPS[0]) for j in range(m)) / m
        for j in range(m):
            column[j] = b2 * column[j] + (1 - b2) * sum((g[i, j] ** 2 + EPS[0]) for i in range(n)) / n
        for i in range(n):
            for j in range(m):
                square[i, j] = b2 * square[i, j] + (1 - b2) * (g[i, j] ** 2 + EPS[0])
                v = row[i] * column[j] / (sum(row) / n) if matrix else square[i, j]
                update[i, j] = g[i, j] / v**0.5
        rms = (sum(u**2 for u in update.flatten()) / (n * m)) ** 0.5
        update = update / max(1.0, float(rms) / CLIP)
        mean = b1 * mean + (1 - b1) * update
        out = mean
        if matrix:
            u = (update - mean) ** 2 + EPS[1]
            unstable_row = b3 * unstable_row + (1 - b3) * u.mean(1)
            unstable_column = b3 * unstable_column + (1 - b3) * u.mean(0)
            s = unstable_row[:, None] * unstable_column[None] / unstable_row.mean()
            out = mean / s.sqrt()
        theta = theta * (1 - RATE * DECAY) - RATE * out
    return theta.reshape(shape)


def test_steps_are_those_of_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(came_module, "CHUNK", 20)  # several chunks, and one parameter above
    net = Net()
    before, steps = copy.deepcopy(net), gradients(net, 4)
    after = run(net, Came(net.parameters(), RATE, BETAS, EPS, CLIP, DECAY), steps)
    for i, p in enumerate(before.parameters()):
        torch.testing.assert_close(after[i].double(), by_hand(p, [s[i] for s in steps]), rtol=2e-5, atol=1e-6)


def test_matrices_step_as_the_authors_package_does() -> None:
    peer = pytest.importorskip("came_pytorch")
    net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    other, steps = copy.deepcopy(net), gradients(net, 6)
    options = {"lr": RATE, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
    ours = run(net, Came(net.parameters(), **options), steps)
    theirs = run(other, peer.CAME(other.parameters(), clip_threshold=CLIP, **options), steps)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_half_precision_keeps_its_state_in_float32_also_after_a_resume() -> None:
    net = Net().to(torch.bfloat16)
    optimizer = Came(net.parameters())
    run(net, optimizer, gradients(net, 2, torch.bfloat16))
    resumed = Came(net.parameters())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p in net.parameters():
        own = resumed.state[p]
        assert own.keys() == optimizer.state[p].keys()
        assert {v.dtype for v in own.values()} == {torch.float32}
        assert all(torch.equal(v, optimizer.state[p][k]) for k, v in own.items())


def test_state_of_a_matrix_is_rows_and_columns_beside_the_mean() -> None:
    p = nn.Parameter(torch.zeros(512, 256))
    p.grad = torch.ones_like(p)
    optimizer = Came([p])
    optimizer.step()
    assert sum(v.numel() for v in optimizer.state[p].values()) == 512 * 256 + 2 * (512 + 256)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"betas": (0.9, 0.999)}, "expected three numbers"), ({"eps": (0.0, 1e-16)}, "expected two numbers above 0")],
)
def test_options_that_are_wrong_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Came(nn.Linear(2, 2).parameters(), **options)


def test_the_count_of_steps_stays_on_the_cpu_after_a_resume() -> None:
    """A step reads it: on a device each step would wait for the host."""
    saved = AdamW8bit([nn.Parameter(torch.zeros(2))])
    saved.state[saved.param_groups[0]["params"][0]] = {"step": torch.tensor(3.0), "mean_values": torch.ones(2)}
    resumed = AdamW8bit([nn.Parameter(torch.zeros(2, device="meta"))])
    eight_bit.restore(resumed, saved.state_dict())
    (state,) = resumed.state.values()
    assert {name: value.device.type for name, value in state.items()} == {"step": "cpu", "mean_values": "meta"}
    assert float(state["step"]) == 3


class TestEightBits:
    @pytest.fixture(autouse=True)
    def _torchao(self) -> None:
        pytest.importorskip("torchao")

    def wide(self) -> tuple[nn.Linear, list[list[Tensor]]]:
        """A layer whose matrix is large enough for 8 bits, its bias not; gradients of one direction."""
        torch.manual_seed(0)
        net = nn.Linear(128, 256)
        steps = gradients(net, 5)
        return net, [[g + g.abs().mean() for g in step] for step in steps]

    @pytest.mark.parametrize(
        ("make", "plain", "size"),
        [
            (lambda p: Came(p, RATE, bits=8), lambda p: Came(p, RATE), 128 * 256 * 1.04),
            (lambda p: AdamW8bit(p, RATE), lambda p: torch.optim.AdamW(p, RATE), 2 * 128 * 256 * 1.04),
        ],
    )
    def test_steps_are_near_those_in_32_bits_in_a_fraction_of_the_state(self, make, plain, size) -> None:
        net, steps = self.wide()
        peer, start = copy.deepcopy(net), net.weight.detach().clone()
        optimizer = make(net.parameters())
        (ours, _), (theirs, _) = run(net, optimizer, steps), run(peer, plain(peer.parameters()), steps)
        difference = (ours - theirs).norm() / (theirs - start).norm()
        assert 0 < difference < 0.03
        weight = sum(v.numel() * v.element_size() for v in optimizer.state[net.weight].values())
        assert weight < size + 8 * (128 + 256)

    def test_small_parameters_step_as_adamw_does(self) -> None:
        net = Net()
        peer, steps = copy.deepcopy(net), gradients(net, 4)
        options = {"lr": RATE, "betas": (0.9, 0.98), "weight_decay": 0.1}
        ours = run(net, AdamW8bit(net.parameters(), **options), steps)
        torch.testing.assert_close(ours, run(peer, torch.optim.AdamW(peer.parameters(), **options), steps))

    @pytest.mark.parametrize("make", [lambda p: Came(p, RATE, bits=8), lambda p: AdamW8bit(p, RATE)])
    def test_a_resumed_run_equals_an_unbroken_one(self, make, tmp_path) -> None:
        net, steps = self.wide()
        net = net.to(torch.bfloat16)
        first = make(net.parameters())
        run(net, first, steps[:3])
        other = copy.deepcopy(net)
        torch.save(first.state_dict(), tmp_path / "state")
        second = make(other.parameters())
        second.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
        for a, b in zip(run(net, first, steps[3:]), run(other, second, steps[3:]), strict=True):
            assert torch.equal(a, b)

    def test_rounding_is_within_a_code_of_the_block(self) -> None:
        values = torch.randn(4, eight_bit.BLOCK, generator=torch.Generator().manual_seed(0))
        state = eight_bit.zeros(values)
        assert not eight_bit.read(state, signed=True).any()
        eight_bit.write(state, values, signed=True)
        error = (eight_bit.read(state, signed=True).view_as(values) - values).abs()
        assert (error <= 0.01 * values.abs().amax(1, keepdim=True)).all()


@pytest.mark.parametrize("spec", [{"name": "came", "bits": 8}, "adamw_8bit"])
def test_without_torchao_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, spec: Any) -> None:
    monkeypatch.setattr(eight_bit.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"needs torchao for its 8-bit state: pip install 'sana_lab\[quantize\]'"):
        specs.build("optimizer", spec, params=nn.Linear(2, 2).parameters())
