"""What every autoencoder promises, whatever it is made of."""

import pytest
import tiny
import torch

from sana_lab.config.registry import TABLE
from sana_lab.models.autoencoders import Autoencoder

SPECS = {"vae": {**tiny.VAE, "widths": [8, 8, 8]}, "dcae": tiny.DCAE}  # both 4x


@pytest.fixture(params=sorted(TABLE["autoencoder"]))
def model(request) -> Autoencoder:
    return tiny.autoencoder(SPECS[request.param])


def test_latents_are_a_downsampled_grid(model):
    latents = model.encode(torch.randn(2, 3, 16, 32))
    assert latents.shape == (2, model.channels, 16 // model.downsample, 32 // model.downsample)
    assert model.decode(latents).shape == (2, 3, 16, 32)


def test_encode_is_deterministic(model):
    images = torch.randn(1, 3, 16, 16)
    assert model.encode(images).equal(model.encode(images))


def test_normalisation_gives_unit_latents_and_changes_no_reconstruction(model):
    images = torch.randn(8, 3, 16, 16)
    before = model.decode(model.encode(images))
    model.fit_normalisation(model.posterior(images)[0])
    latents = model.encode(images)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(model.channels), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3), correction=0), torch.ones(model.channels), atol=1e-4, rtol=0)
    torch.testing.assert_close(model.decode(latents), before, atol=1e-4, rtol=1e-4)


def test_a_size_that_does_not_divide_is_refused(model):
    with pytest.raises(ValueError, match=r"image size 18x16 is not a multiple .* 4; the nearest is 16x16"):
        model.encode(torch.randn(1, 3, 18, 16))


def test_the_posterior_has_a_width_for_each_latent_value(model):
    mean, log_variance = model.posterior(torch.randn(2, 3, 16, 16))
    assert mean.shape == log_variance.shape
    assert log_variance.min() >= -30
    assert log_variance.max() <= 20


def test_images_do_not_mix(model):
    a, b = torch.randn(2, 1, 3, 16, 16)
    together = model.decode(model.encode(torch.cat([a, b])))
    torch.testing.assert_close(together[1:], model.decode(model.encode(b)), atol=1e-4, rtol=1e-4)
