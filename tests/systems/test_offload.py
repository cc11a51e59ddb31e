"""Networks that visit a device: the meta device stands for one, as nothing can be read there by mistake."""

import pytest
import tiny
import torch
from torch import nn

from sana_lab.diffusion.sampling import Sampling
from sana_lab.systems.offload import Offload
from sana_lab.systems.text2image import TextToImage

FAST = Sampling("euler", 2, 3.0)


class Net(nn.Module):
    """Parameters, a shared one, buffers, and an empty place."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2))
        self.tied = nn.Linear(2, 2, bias=False)
        self.tied.weight = self.inner[0].weight
        self.inner[0].weight.requires_grad_(False)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {**dict(self.named_parameters(remove_duplicate=False)), **dict(self.named_buffers())}


def test_a_network_is_there_while_it_works_and_then_home():
    net = Net()
    before = net.tensors()
    with Offload("meta").visit(net):
        there = net.tensors()
        assert {t.device.type for t in there.values()} == {"meta"}
        assert net.tied.weight is net.inner[0].weight
        assert {n: (type(t), t.requires_grad) for n, t in there.items()} == {
            n: (type(t), t.requires_grad) for n, t in before.items()
        }
    after = net.tensors()
    assert before.keys() == after.keys()
    assert all(after[n] is t for n, t in before.items())


def test_it_comes_home_from_an_error_too():
    net = Net()
    with pytest.raises(KeyError), Offload("meta").visit(net):
        raise KeyError
    assert {t.device.type for t in net.tensors().values()} == {"cpu"}


def test_at_home_nothing_moves():
    net = Net()
    before = net.tensors()
    with Offload("cpu").visit(net):
        assert all(net.tensors()[n] is t for n, t in before.items())


def system() -> TextToImage:
    return tiny.text2image().eval()


class Log(Offload):
    """Who visits, and that nobody else is there."""

    def __init__(self, parts: TextToImage) -> None:
        super().__init__("cpu")
        self.parts, self.seen = parts, []
        self.inside = 0

    def visit(self, network):
        self.seen.append(next(k for k in ("text_encoder", "dit", "autoencoder") if getattr(self.parts, k) is network))
        return super().visit(network)


def test_each_stage_has_its_network_alone_and_the_picture_is_the_same():
    parts = system()
    expected = parts.sample(["a ring", "a cross"], size=16, sampling=FAST)
    parts.offload = Log(parts)
    assert parts.sample(["a ring", "a cross"], size=16, sampling=FAST).equal(expected)
    assert parts.offload.seen == ["text_encoder", "dit", "autoencoder"]
    parts.sample(["a ring", "a cross"], size=16, sampling=FAST, batch=1)
    assert parts.offload.seen == ["text_encoder", "dit", "autoencoder"] * 3


def test_settling_says_who_stays_where():
    parts = system().prepare_for_sampling(Sampling(offload=True), "meta")
    assert parts.offload.device.type == "meta"
    assert {p.device.type for p in parts.parameters()} == {"cpu"}
    assert parts.prepare_for_sampling(FAST, "cpu").offload is None


@pytest.mark.gpu
def test_on_a_gpu_only_the_largest_network_is_held():
    parts, how = system(), Sampling("euler", 2, 3.0, offload=True)
    expected = system().to("cuda").sample(["a ring"], size=16, sampling=how)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = parts.prepare_for_sampling(how, "cuda").sample(["a ring"], size=16, sampling=how)
    assert (found.int() - expected.int()).abs().max() <= 1
    assert torch.cuda.memory_allocated() - before <= found.nbytes + 2**20
    assert {p.device.type for p in parts.parameters()} == {"cpu"}
