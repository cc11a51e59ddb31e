"""The moving average against a loop written out, and what it leaves alone."""

from io import BytesIO

import pytest
import torch
from torch import nn

from sana_lab.systems.ema import Average, trainable


def module() -> nn.Sequential:
    """A layer that trains, one that is frozen, and a norm with buffers."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.BatchNorm1d(2))
    made[1].requires_grad_(False)
    return made


def step(made: nn.Module, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn(p.shape, generator=random).to(p))


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999])
def test_average_is_the_recurrence(decay: float):
    """a <- d a + (1 - d) p with d = min(decay, (1 + n) / (10 + n)) at update n = 1, 2, ..."""
    made = module()
    average, expected = Average(made, decay), made[0].weight.detach().double().clone()
    for n in range(1, 30):
        step(made, n)
        average.update(made)
        d = min(decay, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * made[0].weight.detach().double()
    assert torch.allclose(average.values["0.weight"].double(), expected, atol=1e-5)
    assert average.updates == 29


def test_long_runs_remember_one_over_one_minus_decay():
    """After the warm-up a jump is forgotten at the stated rate."""
    made = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(made.weight)
    average = Average(made, 0.9)
    for _ in range(100):
        average.update(made)
    nn.init.ones_(made.weight)
    for _ in range(7):
        average.update(made)
    assert average.values["weight"].item() == pytest.approx(1 - 0.9**7, abs=1e-5)


def test_only_what_trains_is_followed():
    made = module()
    average = Average(made, 0.9)
    assert list(average.values) == ["0.weight", "0.bias", "2.weight", "2.bias"] == [name for name, _ in trainable(made)]


def test_average_does_not_share_memory_with_the_module():
    made = module()
    before = made[0].weight.detach().clone()
    average = Average(made, 0.9)
    step(made, 1)
    assert torch.equal(average.values["0.weight"], before)


def test_half_precision_is_averaged_in_float32():
    """A small step vanishes in bfloat16's rounding, but not in the average's."""
    made = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.ones_(made.weight)
    average = Average(made, 0.99)
    nn.init.constant_(made.weight, 1 + 2**-7)
    average.update(made)
    value = average.values["weight"]
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(1 + 2**-7 * 9 / 11)
    with average.swapped(made):
        assert made.weight.dtype == torch.bfloat16


def test_swapped_lends_the_average_and_gives_the_weights_back():
    made = module()
    average = Average(made, 0.5)
    step(made, 1)
    average.update(made)
    raw = {k: v.clone() for k, v in made.state_dict().items()}
    with average.swapped(made):
        assert torch.equal(made[0].weight, average.values["0.weight"])
        assert not torch.equal(made[0].weight, raw["0.weight"])
        assert torch.equal(made[1].weight, raw["1.weight"])
    assert all(torch.equal(v, raw[k]) for k, v in made.state_dict().items())


def test_weights_come_back_after_an_error():
    made = module()
    average = Average(made, 0.5)
    step(made, 1)
    raw = made[0].weight.detach().clone()

    def fail() -> None:
        with average.swapped(made):
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert torch.equal(made[0].weight, raw)


def test_write_stays():
    made = module()
    average = Average(made, 0.5)
    expected = made[0].weight.detach().clone()
    step(made, 1)
    average.write(made)
    assert torch.equal(made[0].weight, expected)
    assert made[0].weight.requires_grad


def test_state_goes_through_a_file_and_training_goes_on_as_if_unbroken():
    made = module()
    average = Average(made, 0.9)
    for n in range(5):
        step(made, n)
        average.update(made)
    torch.save(average.state(), file := BytesIO())
    file.seek(0)
    again = Average(module(), 0.9)
    again.load(torch.load(file, weights_only=True))
    step(made, 9)
    average.update(made)
    again.update(made)
    assert again.updates == average.updates == 6
    assert all(torch.equal(again.values[k], v) for k, v in average.values.items())


def test_state_of_another_module_is_refused():
    made, other = module(), module()
    other.requires_grad_(True)
    with pytest.raises(ValueError, match=r"of other parameters: 1\.bias, 1\.weight"):
        Average(made, 0.9).load(Average(other, 0.9).state())


def test_state_of_other_shapes_is_refused():
    made, wide = module(), Average(module(), 0.9).state()
    wide["values"] = {k: torch.zeros(9, *v.shape) for k, v in wide["values"].items()}
    with pytest.raises(ValueError, match=r"of other shapes: 0\.weight \(9, .*, expected \("):
        Average(made, 0.9).load(wide)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5])
def test_decay_has_a_range(decay: float):
    with pytest.raises(ValueError, match=f"decay is {decay}, expected 0 <= decay < 1"):
        Average(module(), decay)
