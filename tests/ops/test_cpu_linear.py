"""Products by a 1x1 convolution: equal to the layer's, taken in inference alone."""

import pytest
import torch
from torch import nn

from sana_lab.ops import cpu_linear as module
from sana_lab.ops.cpu_linear import by_convolution, pays, product


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(48, 80)


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU on which it pays from the first product on."""
    monkeypatch.setattr(module, "MIN_PRODUCTS", 0)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")


@pytest.mark.parametrize("shape", [(2, 5, 7, 48), (3, 11, 48), (1, 48)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_layers_product(shape: tuple[int, ...], bias: bool):
    layer, x = nn.Linear(48, 80, bias=bias), torch.randn(shape)
    with torch.no_grad():
        found, truth = by_convolution(layer, x), (x.double() @ layer.weight.double().mT)
        truth = truth + layer.bias.double() if bias else truth
    assert found.shape == truth.shape
    assert found.is_contiguous()
    assert (found.double() - truth).norm() / truth.norm() < 1e-6


def test_strided_tokens_go_through(layer: nn.Linear):
    x = torch.randn(2, 6, 96)[..., ::2]
    with torch.no_grad():
        torch.testing.assert_close(by_convolution(layer, x), layer(x))


@pytest.mark.usefixtures("able")
def test_training_autocast_and_other_dtypes_keep_the_layer(layer: nn.Linear):
    x = torch.randn(4, 48)
    assert not pays(layer, x)
    with torch.no_grad():
        assert pays(layer, x)
        torch.testing.assert_close(product(layer, x), layer(x))
        assert not pays(layer.double(), x.double())
        assert not pays(layer.float(), x.to("meta"))
        with torch.autocast("cpu", torch.bfloat16):
            assert not pays(layer, x)
    assert torch.equal(product(layer, x), layer(x))


@pytest.mark.usefixtures("able")
def test_an_explicit_torch_keeps_the_layer(layer: nn.Linear, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "by_convolution", lambda *_: pytest.fail("a convolution"))
    with torch.no_grad():
        x = torch.randn(4, 48)
        assert torch.equal(product(layer, x, "torch"), layer(x))


@pytest.mark.usefixtures("able")
def test_other_layers_and_weights_keep_their_own_product(layer: nn.Linear):
    class Other(nn.Linear):
        pass

    class Weight(nn.Parameter):
        pass

    with torch.no_grad():
        x = torch.randn(4, 48)
        assert not pays(Other(48, 80), x)
        layer.weight = Weight(layer.weight.detach())
        assert not pays(layer, x)


@pytest.mark.usefixtures("able")
def test_a_watched_layer_is_called(layer: nn.Linear):
    seen: list[torch.Size] = []
    layer.register_forward_hook(lambda _, __, out: seen.append(out.shape))
    with torch.no_grad():
        product(layer, torch.randn(4, 48))
    assert seen == [torch.Size([4, 80])]


def test_small_products_keep_the_layer(layer: nn.Linear):
    with torch.no_grad():
        assert not pays(layer, torch.randn(4, 48))
