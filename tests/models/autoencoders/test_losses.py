"""KL against torch.distributions, LPIPS against torchmetrics, hinge losses against their definition."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torchmetrics.functional.image import lpips as reference

from sana_lab.models.autoencoders import losses


def test_kl_equals_torch_distributions():
    mean, log_variance = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64)
    expected = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(torch.zeros_like(mean), 1.0))
    torch.testing.assert_close(losses.kl_divergence(mean, log_variance), expected)


def test_hinge_losses_by_hand():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert losses.hinge_discriminator(real, fake) == pytest.approx(0.5 * ((0 + 0.5) / 2 + (0 + 1.0) / 2))
    assert losses.hinge_generator(fake) == pytest.approx(1.5)


def stages(net):
    return losses.alex_stages() if net == "alex" else losses.vgg_stages(losses.Lpips.stages)


@pytest.fixture(scope="module", params=["vgg", "alex"])
def pair(request, tmp_path_factory):
    """A file like torchvision's, with random weights, and torchmetrics' own LPIPS on the same ones."""
    torch.manual_seed(0)
    net = request.param
    ours = torch.nn.Sequential(*(layer for stage in stages(net) for layer in stage))
    path = tmp_path_factory.mktemp(net) / f"{net}.pth"
    torch.save({f"features.{k}": v for k, v in ours.state_dict().items()}, path)
    theirs = reference._LPIPS(net=net, pnet_rand=True)
    slices = [getattr(theirs.net, f"slice{i}") for i in range(1, 6)]
    flat = {k: v for part in slices for k, v in part.state_dict().items()}
    assert flat.keys() == ours.state_dict().keys()
    for part in slices:
        part.load_state_dict({k: ours.state_dict()[k] for k in part.state_dict()})
    return net, path, theirs


def test_lpips_equals_torchmetrics(pair):
    net, path, theirs = pair
    a, b = torch.rand(2, 2, 3, 32, 48) * 2 - 1
    ours = losses.Lpips(path, net)
    torch.testing.assert_close(ours(a, b), theirs(a, b).flatten(), rtol=1e-4, atol=1e-6)
    assert ours(a, a).abs().max() == 0
    assert ours(a, b).min() > 0


def test_lpips_takes_images_down_to_its_least_side(pair):
    net, path, _ = pair
    ours = losses.Lpips(path, net)
    a, b = torch.rand(2, 1, 3, ours.min_size, ours.min_size)
    assert ours(a, b) > 0
    with pytest.raises(RuntimeError, match=r"too small|Kernel size"):
        ours(a[..., 1:], b[..., 1:])


def test_lpips_trains_the_image_and_not_itself(pair):
    net, path, _ = pair
    ours = losses.Lpips(path, net)
    a = torch.rand(1, 3, 32, 32, requires_grad=True)
    ours(a, torch.rand(1, 3, 32, 32)).sum().backward()
    assert a.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in ours.parameters())


def test_lpips_without_weights_says_what_it_needs(tmp_path):
    with pytest.raises(ValueError, match="no file was given; set lpips_weights to a vgg16"):
        losses.Lpips(None)
    with pytest.raises(ValueError, match=r"AlexNet weights and there is no file .*nowhere\.pth"):
        losses.Lpips(tmp_path / "nowhere.pth", "alex")
    torch.save({"classifier.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"holds no 'features\.0\.weight'"):
        losses.Lpips(tmp_path / "other.pth")
    torch.save({"features.0.weight": torch.zeros(64, 3, 11, 11)}, tmp_path / "alexnet.pth")
    with pytest.raises(ValueError, match=r"holds a \(64, 3, 11, 11\) .*torchvision's vgg16"):
        losses.Lpips(tmp_path / "alexnet.pth")
    with pytest.raises(ValueError, match="expected one of: vgg, alex"):
        losses.Lpips(None, "squeeze")
